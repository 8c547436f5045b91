"""Check that the processes on each GPU of a plan fit its memory, and compute the setting with which they would.

Nothing is refused if the memory of a GPU is not known.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from sdft.learner.config import LearnerConfig, LoraConfig
from sdft.services.base.errors import PreflightError
from sdft.services.planning.cards import cards
from sdft.services.planning.learner_load import LearnerLoad
from sdft.services.planning.parts import Part, together_gib
from sdft.services.planning.plan import Plan

STEP = 1024  # tokens between two sizes of a micro-batch that are tried
RANKS = (2, 4, 8)


def check_gpu_memory(plan: Plan) -> None:
    """PreflightError if a GPU is too small for an engine's least, or for what is on it together."""
    for part in plan.parts:
        _check_share(part, plan.card_gib)
    for parts in crowded(plan):
        assert plan.card_gib is not None
        raise PreflightError(_sentence(plan, parts, plan.card_gib))


def crowded(plan: Plan) -> Iterator[list[Part]]:
    """Yield the processes of each GPU that needs more than it has."""
    for parts in cards(plan.parts):
        if plan.card_gib is not None and together_gib(parts) > plan.card_gib:
            yield parts


def _check_share(part: Part, card: float | None) -> None:
    held = part.engine
    if held is None or held.cache is not None or card is None or held.least <= held.share * card:
        return
    needs = (
        f"the weights ({held.weights:.1f} GiB), one sequence ({held.sequence:.2g}) and a workspace "
        f"({held.workspace:.1f}) of {part.name} need {held.least:.1f} GiB"
    )
    least = math.ceil(100 * held.least / card) / 100
    if least > 1:
        raise PreflightError(f"{needs}, and a GPU has {card:.1f} GiB; use a smaller model, or GPUs with more memory")
    raise PreflightError(
        f"actors.{part.pool}.gpu_memory_utilization {held.share:g} is {held.share * card:.1f} of a GPU's {card:.1f} "
        f"GiB, and {needs}; set it to {least:g}"
    )


def _sentence(plan: Plan, parts: Sequence[Part], card: float) -> str:
    total, largest = together_gib(parts), max(parts, key=lambda p: p.gpu_gib)
    mend = _mend(plan, parts, card) or "use a smaller model, or GPUs with more memory"
    if len(parts) == 1:
        return f"{largest.name} needs about {total:.1f} GiB, and its GPU has {card:.1f} GiB; {mend}"
    return (
        f"{_joined([p.name for p in parts])} share a GPU of {card:.1f} GiB and need about {total:.1f} GiB, of which "
        f"{largest.gpu_gib:.1f} for {largest.name}; {mend}"
    )


def _mend(plan: Plan, parts: Sequence[Part], card: float) -> str | None:
    """Return the settings with which the processes fit a GPU: of the largest process if there are any, else others."""
    ranks, engines = ([p for p in parts if (p.pool is None) == of_learner] for of_learner in (True, False))
    sleeping = any(part.sleeps for part in parts)
    of_rank = [(card - sum(p.held(steps, sleeping) for p in engines)) / max(1, len(ranks)) for steps in (True, False)]
    mends = [
        lambda: _of_learner(plan.load, *of_rank) if ranks else None,
        lambda: _of_engines(engines, card - sum(p.held(False, sleeping) for p in ranks)),
    ]
    if max(parts, key=lambda p: p.gpu_gib).pool is not None:
        mends.reverse()
    return mends[0]() or mends[1]()


def _of_engines(engines: Sequence[Part], room: float) -> str | None:
    """Return smaller KV caches of engines that have some. Those with less than an even share keep theirs."""
    held = {p.pool: p.engine for p in engines if p.engine is not None and p.engine.cache is not None}
    of_pool = Counter(p.pool for p in engines)
    room -= sum(p.engine.weights + p.engine.workspace for p in engines if p.engine is not None)
    left, smaller = len(engines), []
    for pool, memory in sorted(held.items(), key=lambda item: item[1].cache or 0):
        cache = min(memory.cache or 0, math.floor(10 * room / left) / 10)
        if cache < memory.sequence or cache <= 0:
            return None
        if cache < (memory.cache or 0):
            smaller.append(f"actors.{pool}.kv_cache_gib: {cache:g}")
        room -= cache * of_pool[pool]
        left -= of_pool[pool]
    return f"set {_joined(smaller)}" if smaller else None


def _of_learner(load: LearnerLoad | None, room: float, resting: float) -> str | None:
    """Return changes with which a rank has room. resting: room between two steps."""
    assert load is not None  # of a plan with a rank
    for changes in _changes(load):
        changed = load.config.learner.model_copy(update=changes)
        gib = load.gpu_gib(changed)
        if gib <= room and load.resting_gib(changed) <= resting:
            settings = [f"learner.{key}: {_text(value)}" for key, value in changes.items()]
            return f"set {_joined(settings)} (then {gib:.1f} GiB a rank)"
    return None


def _changes(load: LearnerLoad) -> Iterator[dict[str, object]]:
    """Yield changes of the learner's settings that take less memory, those that cost least first."""
    learner = load.config.learner
    recompute: dict[str, object] = {} if learner.gradient_checkpointing else {"gradient_checkpointing": True}
    yield recompute
    sizes = _sizes(load, learner)
    for further in ({}, recompute):
        yield from ({"micro_batch_tokens": size} | further for size in sizes)
    if not learner.offload:
        for further in ({}, recompute):
            yield {"offload": True} | further
    smallest: dict[str, object] = {"micro_batch_tokens": sizes[-1]} if sizes else {}
    if learner.gpus >= 1 and learner.lora is None:  # else more ranks may be put on the same GPU
        for stage in ({}, {"zero_stage": 3}):
            for ranks in RANKS:
                if learner.ranks < ranks <= load.rollouts:
                    yield {"ranks": ranks} | stage | recompute
                    yield {"ranks": ranks} | stage | recompute | smallest
    if learner.lora is None:
        for further in ({}, recompute, recompute | smallest):
            yield {"lora": LoraConfig()} | further


def _sizes(load: LearnerLoad, learner: LearnerConfig) -> list[int]:
    """Return smaller micro-batches that hold the longest sequence, the largest first."""
    least = -(-load.longest_sequence // STEP) * STEP
    return list(range((learner.tokens_at_once("cuda") - 1) // STEP * STEP, least - 1, -STEP))


def _text(value: object) -> str:
    if isinstance(value, LoraConfig):
        return f"{{rank: {value.rank}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
