"""Models that the engines cannot run, or cannot update, by config.json: each with its reason and the mend.

Known for vLLM 0.32.0. tests/models tries every family that is not listed here, and docs/models.md has the results.
"""

from typing import Any

CHOOSE = "choose another model"


def engine_limit(config: dict[str, Any], device: str, dtype: str) -> str | None:
    """Return why engines cannot serve the model of a config.json, as the end of a sentence with the mend, or None."""
    text = config.get("text_config")
    kind = str((text if isinstance(text, dict) else config).get("model_type", ""))
    cpu = device == "cpu"
    if cpu and kind == "nemotron_h" and "moe" in config.get("layers_block_type", ()):
        return f"vLLM has no kernels for its experts on a CPU; use device: cuda, or {CHOOSE}"
    if cpu and dtype == "float32" and kind.startswith(("qwen3_next", "qwen3_5")):
        return "vLLM computes its delta nets on a CPU in bfloat16 only; set dtype: bfloat16"
    return None
