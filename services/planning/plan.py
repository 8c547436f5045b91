"""The plan of a run: its processes, their estimated memory and their Ray resources."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sdft.actors.config import TURN_ENGINE, VLLM, EngineSettings, Execution
from sdft.actors.roles import EVALUATION, STUDENT, TEACHER, teacher_pool
from sdft.actors.shared.process import GIB
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.planning.memory import ENGINE_BYTES, WIDTH, learner_gib, scores_bytes
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
class Part:
    """One process of the run."""

    name: str
    cpus: float  # Ray CPUs
    gpus: float
    memory_gib: float  # main memory with device: cpu
    labels: Mapping[str, str] = field(default_factory=dict)  # labels of the nodes where it may be placed

    @property
    def bundle(self) -> dict[str, float]:
        """Its placement group bundle: Ray resources by name."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True)
class Plan:
    """All processes, in the order of the placement group's bundles."""

    pools: Mapping[str, tuple[Part, ...]]  # the first engines of each pool, by its name
    learners: tuple[Part, ...]
    growing: Mapping[str, int] = field(default_factory=dict)  # most engines of a pool, if more than at the start
    held_gib: float = 0.0  # scores in Ray's object store, and in the driver if it records them

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
        lines = [f"{'process':<22}{'Ray CPUs':>10}{'GPUs':>6}{'memory':>12}"]
        lines += [f"{p.name:<22}{p.cpus:>10g}{p.gpus:>6g}{p.memory_gib:>8.1f} GiB" for p in self.parts]
        lines.append(f"{'Ray and driver':<22}{0:>10g}{0:>6g}{RAY_BASE_GIB + self.held_gib:>8.1f} GiB")
        lines.append(f"{'total':<22}{self.cpus:>10g}{self.gpus:>6g}{self.memory_gib:>8.1f} GiB")
        lines += [
            f"up to {most} {pool} engines while the learner waits for them" for pool, most in self.growing.items()
        ]
        return "\n".join(lines)


def make_plan(
    config: RunConfig,
    shape: ModelShape,
    longest_prompts: Sequence[int],
    teacher_parameters: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Make the plan of a run. longest_prompts: tokens of the longest student prompt of each task.

    teacher_parameters: of each external teacher, by the name of its pool.
    """
    cuda = config.device == "cuda"
    bytes_of_weight = WIDTH[config.dtype]

    scored = [(_rows_of_step(task), width(task, shape.vocabulary)) for task in config.tasks]
    scoring = STUDENT if config.teacher_in_use.weights == "live" else TEACHER

    def engines(pool: str) -> tuple[Part, ...]:
        e = config.actors.settings(pool)
        weights = teacher_parameters.get(pool, shape.parameters) * bytes_of_weight / GIB
        # An update holds the weights twice (the snapshot is mapped). KV cache and logits of a batch come on top.
        memory = ENGINE_BASE_GIB + 2 * weights + (0 if cuda else e.cpu_cache_gib)
        memory += WORKER_GIB * e.tensor_parallel if e.tensor_parallel > 1 else 0
        if e.engine == TURN_ENGINE:  # the engine is the service's, and keeps the weights
            memory = CLIENT_GIB + weights
        elif config.actors.role_name(pool) == scoring:
            memory += max(ENGINE_BYTES * rows * wide for rows, wide in scored) / e.replicas * e.tensor_parallel / GIB
        gpus = e.gpus_of_engine if cuda else 0
        return tuple(Part(f"{pool} engine {i}", e.cpus, gpus, memory, e.labels) for i in range(e.replicas))

    learner = config.learner
    tasks = zip(config.tasks, longest_prompts, strict=True)
    forwards = [_largest_forward(task, longest) for task, longest in tasks]
    teacher, stages = config.teacher_in_use.of_learner, len(forwards)
    names = pools(config)
    further = [config.actors.role(name).weights for name in names].count(STUDENT) - 1
    memory = max(
        learner_gib(learner, teacher, config.dtype, shape, *forward, stages, further, wide, -(-rows // learner.ranks))
        for forward, (rows, wide) in zip(forwards, scored, strict=True)
    )
    gpus = learner.gpus if cuda else 0
    learners = tuple(
        Part(f"learner rank {i}", learner.cpus, gpus, memory, learner.labels) for i in range(learner.ranks)
    )
    growing = {name: e.most for name in names if (e := config.actors.settings(name)).most > e.replicas}
    held = max(scores_bytes(*of_step) for of_step in scored) / GIB * (1 + config.training.max_staleness)
    held *= 3 if config.monitoring.record_rollouts else 1  # the driver joins the scores of a step, and makes a file
    return Plan({name: engines(name) for name in names}, learners, growing, held)


def _rows_of_step(config: TaskConfig) -> int:
    """Return the loss tokens of a step with completions of full length."""
    return config.training.batch_size * config.sampling.generations * config.longest_reply


def _largest_forward(config: TaskConfig, longest_prompt: int) -> tuple[int, int, int]:
    """Return (tokens, loss tokens, tokens a sequence) of a rank's largest forward, with completions of full length."""
    sequence = longest_prompt + config.longest_reply
    share = -(-config.training.batch_size * config.sampling.generations // config.learner.ranks)
    sequences = max(1, min(share, config.learner.tokens_at_once(config.device) // sequence))
    return sequences * sequence, sequences * config.longest_reply, sequence


def pools(config: RunConfig) -> tuple[str, ...]:
    """Return the names of the pools that are started.

    With a live teacher the student engines also score; without a teacher (`teacher_in_use` is "live") no engine
    scores. Without evaluation sets no pool is started for them. Each of several teachers has a pool.
    """
    idle = {TEACHER: config.teacher_in_use.weights == "live", EVALUATION: not config.sets}
    started = (name for name in config.actors.pools if not idle.get(config.actors.role_name(name)))
    teachers = tuple(map(teacher_pool, config.teacher_in_use.routes))
    return tuple(pool for name in started for pool in (teachers if name == TEACHER else (name,)))


def engine_settings(config: RunConfig, model: Path, pool: str, vocabulary: int | None = None) -> EngineSettings:
    """Settings of an engine of the pool with this name. model: the folder that it loads.

    vocabulary: number of the tokenizer's tokens; None: not known yet.
    UserError if the longest sequence exceeds the model's positions or the KV cache.
    """
    e = config.actors.settings(pool)
    longest_reply = max(
        [task.longest_reply for task in config.tasks]
        + [s.max_new_tokens for s in config.sets]
        + [s.environment.max_tokens for s in config.sets if s.environment is not None]
    )
    max_model_len = max(task.data.max_teacher_prompt_tokens for task in config.tasks) + longest_reply + 1
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
    if config.device == "cpu" and cache > e.cpu_cache_gib:
        raise UserError(
            f"actors.{config.actors.entry(pool)}.kv_cache_gib is {e.cpu_cache_gib:g}, but one sequence of "
            f"{max_model_len} tokens (data.max_teacher_prompt_tokens and the longest reply) needs {cache:.2g} GiB; "
            f"raise kv_cache_gib"
        )
    cache_gib = e.cpu_cache_gib if config.device == "cpu" else e.kv_cache_gib
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
        gpu_memory_utilization=e.gpu_memory_utilization if cache_gib is None else FREE_AT_LEAST,
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
