"""Whether a model can be divided as the settings say.

actors.<pool>.tensor_parallel      over the GPUs or processes of an engine
learner.sequence_parallel          its attention, over ranks that divide the tokens of a pack
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdft.learner.config import LearnerConfig
from sdft.services.base.errors import UserError
from sdft.services.planning.examined import Examined

HEADS = "heads"  # in the names of config.json: of attention, of keys and values, of delta nets, of state spaces
BETWEEN, OF_EXPERTS = "intermediate_size", "moe_intermediate_size"  # with the second not all layers have the first
# The processes among which vLLM's kernels for CPUs can add numbers up.
ON_CPU = (1, 2, 3, 4, 8)
# Each of more processes adds in another order, so that the last bits differ. Their routers may then send a token to
# different experts.
ROUTED_ON_CPU = (1, 2)


def check_split(pool: str, parts: int, device: str, model: Path, shape: Mapping[str, Any]) -> None:
    """UserError unless vLLM can divide the model in the folder `model`, with this config.json, into so many parts."""
    why = _obstacle(shape, parts, device, model)
    if why is not None:
        fits = next(n for n in range(parts - 1, 0, -1) if _obstacle(shape, n, device, model) is None)
        raise UserError(f"actors.{pool}.tensor_parallel is {parts}, and {why}; set it to {fits}")


def check_shared(config: LearnerConfig, found: Examined, model: Path) -> None:
    """UserError unless groups of learner.sequence_parallel ranks can divide the tokens of a pack."""
    together = config.sequence_parallel
    if together in found.shared_by:
        return
    if found.divides:
        why = f"layers of the model in {model} carry something from each token to the next, or compute sequences alone"
    else:
        *few, most = map(str, found.shared_by)
        numbers = f"{', '.join(few)} or {most} ranks" if few else "1 rank"
        why = f"the attention heads of the model in {model} can be divided over {numbers}"
    fits = max(n for n in found.shared_by if config.ranks % n == 0)
    raise UserError(f"learner.sequence_parallel is {together}, and {why}; set it to {fits}")


def _obstacle(shape: Mapping[str, Any], parts: int, device: str, model: Path) -> str | None:
    """Return why the model cannot be divided, as a part of a sentence, or None.

    Fewer heads of keys and values than parts: some of vLLM's models give a head to several parts, and others fail.
    """
    divided = [*(name for name in shape if HEADS in name), OF_EXPERTS if OF_EXPERTS in shape else BETWEEN]
    for name in divided:
        count = shape.get(name)
        if isinstance(count, int) and count % parts:
            return f"the model in {model} has {name} {count}, which is not divided into so many equal parts"
    routed = any("experts" in name and isinstance(n, int) and n > 1 for name, n in shape.items())
    if device == "cpu" and parts not in (ROUTED_ON_CPU if routed else ON_CPU):
        return "on a CPU engines are split over 2, 3, 4 or 8 processes" + ", with experts over 2" * routed
    return None
