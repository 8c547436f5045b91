"""The plan of a run: its processes, their estimated memory and their Ray resources."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdft.actors.config import TURN_ENGINE, VLLM, EngineSettings, Execution
from sdft.actors.roles import EVALUATION, STUDENT, TEACHER, teacher_pool
from sdft.actors.shared.process import GIB
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.planning.cards import cards
from sdft.services.planning.engine_memory import ALONE, EngineMemory
from sdft.services.planning.learner_load import LearnerLoad
from sdft.services.planning.memory import ENGINE_BYTES, WIDTH, scores_bytes
from sdft.services.planning.parts import Part, together_gib
from sdft.services.planning.shape import ModelShape
from sdft.services.planning.split import check_split
from sdft.services.planning.supports import width

# GiB of an engine's two processes together, without weights and KV cache. Measured on the CPU build: 0.8 with a model
# of 0.26 M parameters, 1.0 after steps of SmolLM2-135M in float32; the rest is a margin for larger batches.
ENGINE_BASE_GIB = 1.3
# GiB of each worker of an engine that is split. Measured as above: 0.2; the rest is a margin for larger batches.
WORKER_GIB = 0.3
CLIENT_GIB = 0.5  # process of a window that reaches the engine of its service
# gpu_memory_utilization with an explicit KV cache size: it is only the share of the GPU that must be free at a start.
FREE_AT_LEAST = 0.05
# GiB of Ray's processes and the driver.
RAY_BASE_GIB = 1.2


@dataclass(frozen=True)
class Plan:
    """All processes, in the order of the placement group's bundles."""

    pools: Mapping[str, tuple[Part, ...]]  # the first engines of each pool, by its name
    learners: tuple[Part, ...]
    growing: Mapping[str, int] = field(default_factory=dict)  # most engines of a pool, if more than at the start
    held_gib: float = 0.0  # scores in Ray's object store, and in the driver if it records them
    card_gib: float | None = None  # memory of a GPU; None: not known, or no GPU is used
    load: LearnerLoad | None = None  # of the learner
    chosen: bool = False  # gradient checkpointing is on because the run would not fit without

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*(part for pool in self.pools.values() for part in pool), *self.learners)

    @property
    def cpus(self) -> float:
        return sum(p.cpus for p in self.parts)

    @property
    def gpus(self) -> float:
        return sum(p.gpus for p in self.parts)

    @property
    def memory_gib(self) -> float:
        return RAY_BASE_GIB + self.held_gib + sum(p.memory_gib for p in self.parts)

    def text(self) -> str:
        """Format the plan as a table for a terminal."""
        with_gpus = self.gpus > 0
        lines = [f"{'process':<22}{'Ray CPUs':>10}{'GPUs':>6}{'memory':>12}{'GPU memory' if with_gpus else '':>14}"]
        for part in self.parts:
            gpu = part.gpu_gib * max(1, part.gpus)  # of all its GPUs
            lines.append(self._line(part.name, part.cpus, part.gpus, part.memory_gib, gpu, self._is_least(part)))
        lines.append(self._line("Ray and driver", 0, 0, RAY_BASE_GIB + self.held_gib, 0))
        least, gpu = any(map(self._is_least, self.parts)), sum(p.gpu_gib * max(1, p.gpus) for p in self.parts)
        lines.append(self._line("total", self.cpus, self.gpus, self.memory_gib, gpu, least))
        lines += [
            f"up to {most} {pool} engines while the learner waits for them" for pool, most in self.growing.items()
        ]
        return "\n".join([*(line.rstrip() for line in lines), *(self._cards() if with_gpus else ())])

    def _line(self, name: str, cpus: float, gpus: float, gib: float, gpu_gib: float, least: bool = False) -> str:
        gpu = f"{'from ' if least else ''}{gpu_gib:.1f} GiB" if gpu_gib else ""
        return f"{name:<22}{cpus:>10g}{gpus:>6g}{gib:>8.1f} GiB{gpu:>14}"

    def _is_least(self, part: Part) -> bool:
        """Whether an engine's share of a GPU is not known, so that the GPU memory is the least that it needs."""
        return self.card_gib is None and part.engine is not None and part.engine.cache is None

    def _cards(self) -> Iterator[str]:
        """Yield a line for each GPU of several processes, and one about the memory of a GPU."""
        for i, parts in enumerate(cards(self.parts)):
            if len(parts) > 1:
                yield f"GPU {i}: {', '.join(p.name for p in parts)}: {together_gib(parts):.1f} GiB"
        if self.chosen:
            yield "learner.gradient_checkpointing: true, because a rank would not fit its GPU without it"
        if self.card_gib is None:
            yield "memory of a GPU: not known, so nothing is refused; ray.gpu_memory_gib sets it"
        else:
            yield f"memory of a GPU: {self.card_gib:.1f} GiB"


def make_plan(
    config: RunConfig,
    shape: ModelShape,
    longest_prompts: Sequence[int],
    teachers: Mapping[str, ModelShape] = MappingProxyType({}),
    card_gib: float | None = None,
) -> Plan:
    """Make the plan of a run. longest_prompts: tokens of the longest student prompt of each task.

    teachers: the shape of each external teacher, by the name of its pool. card_gib: memory of a GPU; None: not known.
    """
    cuda = config.device == "cuda"
    learner, load = config.learner, LearnerLoad(config, shape, longest_prompts)
    scoring = STUDENT if config.teacher_in_use.weights == "live" else TEACHER

    def engines(pool: str) -> tuple[Part, ...]:
        e, of_pool = config.actors.settings(pool), teachers.get(pool, shape)
        weights = of_pool.parameters * WIDTH[config.dtype] / GIB
        # An update maps the snapshot, beside the weights of an engine on a CPU. Its KV cache and logits come on top.
        memory = ENGINE_BASE_GIB + (weights if cuda else 2 * weights + e.cpu_cache_gib)
        memory += WORKER_GIB * e.tensor_parallel if e.tensor_parallel > 1 else 0
        held = None
        if e.engine == TURN_ENGINE:  # the engine is the service's, and keeps the weights
            memory = CLIENT_GIB + weights
        else:
            if config.actors.role_name(pool) == scoring:
                most = max(ENGINE_BYTES * rows * wide for rows, wide in load.scored)
                memory += most / e.replicas * e.tensor_parallel / GIB
            if cuda:
                held = EngineMemory.of(of_pool, config.dtype, longest_sequence(config), e)
        part = Part(
            name="",
            cpus=e.cpus,
            gpus=e.gpus_of_engine if cuda else 0,
            memory_gib=memory,
            labels=e.labels,
            pool=config.actors.entry(pool),
            gpu_gib=0 if held is None else held.on(card_gib),
            engine=held,
            sleeps=e.sleep,
        )
        return tuple(replace(part, name=f"{pool} engine {i}") for i in range(e.replicas))

    names = pools(config)
    further = [config.actors.role(name).weights for name in names].count(STUDENT) - 1
    rank = Part(
        name="",
        cpus=learner.cpus,
        gpus=learner.gpus if cuda else 0,
        memory_gib=load.memory_gib(further),
        labels=learner.labels,
        gpu_gib=load.gpu_gib(learner) if cuda else 0,
        resting_gib=load.resting_gib(learner) if cuda else 0,
    )
    growing = {name: e.most for name in names if (e := config.actors.settings(name)).most > e.replicas}
    held = max(scores_bytes(*of_step) for of_step in load.scored) / GIB * (1 + config.training.max_staleness)
    held *= 3 if config.monitoring.record_rollouts else 1  # the driver joins the scores of a step, and makes a file
    return Plan(
        pools={name: engines(name) for name in names},
        learners=tuple(replace(rank, name=f"learner rank {i}") for i in range(learner.ranks)),
        growing=growing,
        held_gib=held,
        card_gib=card_gib,
        load=load,
    )


def pools(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the pools that are started.

    With a live teacher the student engines also score; without a teacher (`teacher_in_use` is "live") no engine
    scores. Without evaluation sets no pool is started for them. Each of several teachers has a pool.
    """
    idle = {TEACHER: config.teacher_in_use.weights == "live", EVALUATION: not config.sets}
    started = (name for name in config.actors.pools if not idle.get(config.actors.role_name(name)))
    teachers = tuple(map(teacher_pool, config.teacher_in_use.routes))
    return tuple(pool for name in started for pool in (teachers if name == TEACHER else (name,)))


def longest_sequence(config: RunConfig) -> int:
    """Return the tokens of the longest sequence of an engine, and one more."""
    longest_reply = max(
        [task.longest_reply for task in config.tasks]
        + [s.max_new_tokens for s in config.sets]
        + [s.environment.max_tokens for s in config.sets if s.environment is not None]
    )
    return max(task.data.max_teacher_prompt_tokens for task in config.tasks) + longest_reply + 1


def engine_settings(config: RunConfig, model: Path, pool: str, vocabulary: int | None = None) -> EngineSettings:
    """Settings of an engine of the pool with this name. model: the folder that it loads.

    vocabulary: number of the tokenizer's tokens; None: not known yet.
    UserError if the longest sequence exceeds the model's positions or the KV cache.
    """
    e = config.actors.settings(pool)
    max_model_len = longest_sequence(config)
    shape = json.loads((model / "config.json").read_text())
    limit = shape.get("max_position_embeddings")
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"data.max_teacher_prompt_tokens and the longest reply add up to {max_model_len} tokens, but the model in "
            f"{model} has {limit} positions; lower data.max_teacher_prompt_tokens, max_new_tokens or "
            f"environment.max_tokens"
        )
    if e.engine == VLLM:
        check_split(config.actors.entry(pool), e.tensor_parallel, config.device, model, shape)
    cache = _cache_bytes_per_token(shape, WIDTH[config.dtype]) * max_model_len / GIB
    cache_gib = e.cpu_cache_gib if config.device == "cpu" else e.kv_cache_gib
    if cache_gib is not None and cache > cache_gib:
        raise UserError(
            f"actors.{config.actors.entry(pool)}.kv_cache_gib is {cache_gib:g}, but one sequence of "
            f"{max_model_len} tokens (data.max_teacher_prompt_tokens and the longest reply) needs {cache:.2g} GiB; "
            f"raise kv_cache_gib"
        )
    return EngineSettings(
        model=str(model),
        dtype=config.dtype,
        device=config.device,
        max_model_len=max_model_len,
        max_logprobs=max(width(task, vocabulary or 1) for task in config.tasks),
        max_num_seqs=e.max_num_seqs,
        hold_batches=config.strict,
        exclusive=config.strict and e.most == 1,
        share_prompts=any(task.sampling.generations > 1 or task.environment is not None for task in config.tasks),
        gpu_memory_utilization=(e.gpu_memory_utilization or ALONE) if cache_gib is None else FREE_AT_LEAST,
        execution=execution(e.execution, config.device),
        max_probe_gap=max_probe_gap(config),
        threads=e.threads,
        kv_cache_gib=cache_gib,
        tensor_parallel=e.tensor_parallel,
        engine=e.engine,
        vocabulary=vocabulary,
    )


def execution(wanted: Execution | None, device: str) -> Execution:
    """Return how engines on a device execute a model; null: as fast as the device can without compiling."""
    return wanted or ("graphs" if device == "cuda" else "eager")


def max_probe_gap(config: RunConfig) -> float:
    """Return weights.max_probe_gap, or its default for the dtype."""
    # Gaps of correct engines: up to 1e-5, and 0.04 for models after long training. Gaps of wrong weights: 0.4 and more.
    return config.weights.max_probe_gap or (0.001 if config.dtype == "float32" else 0.08)


def _cache_bytes_per_token(shape: dict[str, Any], width: int) -> int:
    """Bytes of the keys and values of one token in all layers, from config.json; 0 if it lacks the usual names."""
    heads = shape.get("num_key_value_heads") or shape.get("num_attention_heads")
    layers, hidden = shape.get("num_hidden_layers"), shape.get("hidden_size")
    if not (heads and layers and hidden):
        return 0
    size = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    return int(2 * layers * heads * size * width)
