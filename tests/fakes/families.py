"""Tiny random models of other model families, in the format that transformers saves."""

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


def make_family(folder: Path, family: str, **settings: Any) -> Path:
    """Write a model of transformers' `model_type` with an empty tokenizer_config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE | settings)).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
