"""Tiny random multimodal models: a text model beside a vision model, in the files that transformers writes."""

from pathlib import Path
from typing import Any

from tests.fakes.families import DELTA, ENDS, SHAPE, copy_tokenizer

TEXT = SHAPE | ENDS
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 512, "global_head_dim": 64}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGE = {"image_size": 28, "patch_size": 14}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT | WINDOWS,
        "vision_config": VISION | IMAGE,
        "mm_tokens_per_image": 4,
        "image_token_index": 340,
    },
    "gemma4": {
        "text_config": TEXT | WINDOWS | PER_LAYER | {"final_logit_softcapping": 5.0},
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 16},
        "audio_config": None,
        "image_token_id": 340,
    },
    "qwen3_5": {
        "text_config": TEXT | DELTA,
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "num_position_embeddings": 16,
        },
        "image_token_id": 340,
    },
    "mistral3": {
        "text_config": TEXT | {"model_type": "ministral3"},
        "vision_config": VISION | IMAGE | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 340,
    },
}


def make_multimodal(folder: Path, model_type: str, tokenizer: Path | None = None) -> Path:
    """Write a multimodal model, with the tokenizer files of the folder `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MULTIMODAL[model_type])
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    return folder
