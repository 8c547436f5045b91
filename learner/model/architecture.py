"""Which models the learner can train, told from their configuration. Imports no torch."""

from pathlib import Path

# Settings of a head that is more than a linear layer: the chunked loss would silently leave them out.
HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Layers that keep packed sequences apart by their lengths; others carry a state from one of a pack into the next.
ATTENTION = {"full_attention", "sliding_attention", "attention"}
STATEFUL = {"rwkv", "xlstm"}  # models whose configuration names no kinds of layers


def why_not(path: Path) -> str | None:
    """The reason why the model of a local folder cannot be trained, as the end of a sentence; None if it can."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path)
    except (ValueError, KeyError, OSError) as error:
        return f"transformers does not know what its config.json describes ({str(error).split('. ')[0]})"
    used = [name for name in HEAD if getattr(config, name, None) not in (None, 1, 1.0)]
    if used:
        return f"its head uses {', '.join(used)}, which the loss does not compute"
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = set(kinds) - ATTENTION | ({config.model_type} & STATEFUL)
    if others:
        return (
            f"it has layers other than attention ({', '.join(sorted(others))}), which would mix the sequences that are "
            f"packed together"
        )
    return None
