"""Tiny random models of other model families, in the format that transformers saves."""

import shutil
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
}

ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of the tiny model's tokenizer
DELTA = {  # layers of a delta net, as in Qwen3-Next and Qwen3.5
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
}


def copy_tokenizer(tokenizer: Path, folder: Path) -> None:
    """Copy the tokenizer's files from one model folder to another."""
    for path in tokenizer.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copyfile(path, folder / path.name)


def make_family(folder: Path, family: str, **settings: Any) -> Path:
    """Write a model of transformers' `model_type` with an empty tokenizer_config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | settings)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
