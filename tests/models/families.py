"""The families of models that conformance is checked for, each as a random model of a few hundred thousand parameters.

A family's settings are those that its real models use, in small: grouped queries, windows, soft caps, multipliers,
experts, layers of each type. head_dim is 64, since vLLM's CPU attention has kernels for it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.families import DELTA, ENDS, SHAPE, copy_tokenizer

WINDOW = 8  # tokens; the sequences of the tests are longer
PAIR = ["sliding_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
CONVOLUTIONS = {  # vLLM also reads the settings after the second, which the configurations of real models have
    "layer_types": ["conv", "full_attention"],
    "block_auto_adjust_ff_dim": False,
    "conv_dim": 128,
    "conv_dim_out": 128,
    "conv_use_xavier_init": True,
    "block_dim": 128,
    "block_ff_dim": 128,
    "block_ffn_dim_multiplier": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-5,
}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class Family:
    """A kind of model. `settings` are those of its configuration beside SHAPE; None removes one of SHAPE."""

    name: str
    model_type: str  # of transformers
    kind: str  # what makes it different: dense, window, soft cap, experts, convolution, delta net, state space
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # in which the engine runs it


FAMILIES = {
    family.name: family
    for family in (
        Family("Llama", "llama", "dense"),
        Family(
            "Llama, llama3 rope",
            "llama",
            "dense",
            {
                "rope_parameters": ROPE
                | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            },
        ),
        Family("Llama, yarn rope", "llama", "dense", {"rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}}),
        Family("Qwen2", "qwen2", "dense", {"tie_word_embeddings": True}),
        Family("Qwen3", "qwen3", "dense", {"tie_word_embeddings": True}),
        Family("Mistral", "mistral", "window", {"sliding_window": WINDOW}),
        Family("Ministral 3", "ministral3", "dense"),
        Family("Phi-3", "phi3", "dense"),
        Family("OLMo 2", "olmo2", "dense"),
        Family("OLMo 3", "olmo3", "window", {"sliding_window": WINDOW, "layer_types": PAIR}),
        Family(
            "Granite 3",
            "granite",
            "dense",
            {
                "logits_scaling": 4.0,
                "embedding_multiplier": 6.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.1,
            },
        ),
        Family("SmolLM3", "smollm3", "dense"),
        Family(
            "Gemma 2",
            "gemma2",
            "soft cap",
            {
                "sliding_window": WINDOW,
                "layer_types": PAIR,
                "final_logit_softcapping": 5.0,
                "attn_logit_softcapping": 2.0,
                "query_pre_attn_scalar": 64,
            },
        ),
        Family("Gemma 3", "gemma3_text", "window", {"sliding_window": WINDOW, "layer_types": PAIR}),
        Family(
            "Gemma 4",
            "gemma4_text",
            "soft cap",
            {
                "sliding_window": WINDOW,
                "layer_types": PAIR,
                "final_logit_softcapping": 5.0,
                "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": 512,
                "global_head_dim": 64,
            },
        ),
        Family("GLM 4", "glm4", "dense"),
        Family(
            "EXAONE 4",
            "exaone4",
            "window",
            {"sliding_window": WINDOW, "layer_types": PAIR, "sliding_window_pattern": 2},
        ),
        Family("ERNIE 4.5", "ernie4_5", "dense"),
        Family("Hunyuan", "hunyuan_v1_dense", "dense"),
        Family("LFM2", "lfm2", "convolution", CONVOLUTIONS),
        Family("LFM2 with experts", "lfm2_moe", "convolution", EXPERTS | CONVOLUTIONS | {"num_dense_layers": 1}),
        Family(
            "Qwen3-Next",
            "qwen3_next",
            "delta net",
            EXPERTS | DELTA | {"shared_expert_intermediate_size": 64},
            "bfloat16",
        ),
        Family("Qwen3.5", "qwen3_5_text", "delta net", DELTA, "bfloat16"),
        Family(
            "Qwen3.5 with experts",
            "qwen3_5_moe_text",
            "delta net",
            EXPERTS | DELTA | {"shared_expert_intermediate_size": 64},
            "bfloat16",
        ),
        Family(
            "Granite 4",
            "granitemoehybrid",
            "state space",
            MAMBA
            | {
                "layer_types": ["linear_attention", "full_attention"],
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "shared_intermediate_size": 64,
                "logits_scaling": 4.0,
                "embedding_multiplier": 6.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.1,
            },
        ),
        Family(
            "Nemotron-H",
            "nemotron_h",
            "state space",
            {
                "num_hidden_layers": None,
                "layers_block_type": ["mamba", "attention", "mlp"],
                "mamba_num_heads": 4,
                "mamba_head_dim": 64,
                "ssm_state_size": 16,
                "n_groups": 1,
                "chunk_size": 16,
            },
        ),
        Family(
            "Falcon-H1",
            "falcon_h1",
            "state space",
            MAMBA | {"mamba_d_ssm": 256, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0, "key_multiplier": 0.5},
        ),
        Family("Mixtral", "mixtral", "experts", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        Family("OLMoE", "olmoe", "experts", {"num_experts": 4, "num_experts_per_tok": 2}),
        Family("Qwen3-MoE", "qwen3_moe", "experts", EXPERTS),
        Family(
            "gpt-oss",
            "gpt_oss",
            "experts",
            {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": PAIR},
        ),
        Family(
            "DeepSeek-V3",
            "deepseek_v3",
            "experts",
            {
                "head_dim": None,
                "num_key_value_heads": 2,
                "n_routed_experts": 4,
                "n_group": 2,
                "topk_group": 1,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "first_k_dense_replace": 1,
                "topk_method": "noaux_tc",  # vLLM reads these two, which the configurations of real models have
                "scoring_func": "sigmoid",
                "kv_lora_rank": 512,
                "q_lora_rank": 64,
                "qk_rope_head_dim": 64,
                "qk_nope_head_dim": 128,
                "v_head_dim": 128,
            },
        ),
    )
}


def make_family_model(family: Family, folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write a family's random model into `folder`, with the tokenizer files of the folder `tokenizer`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in (SHAPE | ENDS | family.settings).items() if value is not None}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms, biases, sinks and decays start at constants, which would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    copy_tokenizer(tokenizer, folder)
    return folder
