"""Shapes of models that people train, and random models of these shapes."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from sdft.services.planning.models import resolve_model

# Hidden and intermediate size, layers, heads, key-value heads, vocabulary, tied: Qwen2.5's, and one for tests.
SHAPES = {
    "tiny": (128, 256, 2, 4, 2, 49152, True),
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def configuration(shape: str) -> Qwen2Config:
    """Return the configuration of a model of a shape, with the token ids of the built-in model's tokenizer."""
    hidden, intermediate, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def random_model(shape: str, folder: Path, device: str) -> Path:
    """Write a random bfloat16 model of a shape, with the built-in model's tokenizer, and return its folder.

    device: where the values are drawn.
    """
    out = folder / shape
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(configuration(shape), dtype=torch.bfloat16)
    model.save_pretrained(out)
    built_in = resolve_model("smollm2-135m", Path.cwd())
    for name in TOKENIZER:
        shutil.copy(built_in / name, out)
    _fill(out / "tokenizer.json", model.config.vocab_size)
    return out


def _fill(tokenizer: Path, size: int) -> None:
    """Add tokens that no text has, so that every row of the head is one: the learner leaves out rows beyond."""
    content = json.loads(tokenizer.read_text())
    known = content["model"]["vocab"]
    known |= {f"<row {i}>": i for i in range(len(known), size)}
    tokenizer.write_text(json.dumps(content, ensure_ascii=False))
