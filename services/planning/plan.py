"""What a run will start and need: processes, memory of each part, what Ray must offer. Estimates."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdft.actors.config import EngineSettings
from sdft.actors.shared.process import GIB
from sdft.services.algorithms.methods import teacher_of
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.planning.memory import WIDTH, learner_gib
from sdft.services.planning.shape import ModelShape

# Of an engine's two processes together, beside weights and KV cache. Measured on the CPU build: 0.8 with a model of
# 0.26 M parameters, 1.0 after steps of SmolLM2-135M in float32; the rest is for larger batches.
ENGINE_BASE_GIB = 1.3
# Share of a GPU that vLLM wants free at a start where the cache's size is given, so that nothing else follows from it.
FREE_AT_LEAST = 0.05
# Ray's own processes and the driver.
RAY_BASE_GIB = 1.2


@dataclass(frozen=True)
class Part:
    """One process of the run."""

    name: str
    cpus: float  # Ray CPUs
    gpus: float
    memory_gib: float  # main memory with device: cpu
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes that may hold it

    @property
    def bundle(self) -> dict[str, float]:
        """What it takes of a node, in Ray's words."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True)
class Plan:
    """All processes, in the order of the placement group's bundles."""

    students: tuple[Part, ...]
    teachers: tuple[Part, ...]
    learners: tuple[Part, ...]
    growing: Mapping[str, int] = field(default_factory=dict)  # engines that a role may come to, if more than at first

    @property
    def parts(self) -> tuple[Part, ...]:
        return (*self.students, *self.teachers, *self.learners)

    @property
    def cpus(self) -> float:
        return sum(p.cpus for p in self.parts)

    @property
    def gpus(self) -> float:
        return sum(p.gpus for p in self.parts)

    @property
    def memory_gib(self) -> float:
        return RAY_BASE_GIB + sum(p.memory_gib for p in self.parts)

    def text(self) -> str:
        """The plan as people read it."""
        lines = [f"{'process':<22}{'Ray CPUs':>10}{'GPUs':>6}{'memory':>12}"]
        lines += [f"{p.name:<22}{p.cpus:>10g}{p.gpus:>6g}{p.memory_gib:>8.1f} GiB" for p in self.parts]
        lines.append(f"{'Ray and driver':<22}{0:>10g}{0:>6g}{RAY_BASE_GIB:>8.1f} GiB")
        lines.append(f"{'in all':<22}{self.cpus:>10g}{self.gpus:>6g}{self.memory_gib:>8.1f} GiB")
        lines += [
            f"up to {most} {role} engines while the learner waits for them" for role, most in self.growing.items()
        ]
        return "\n".join(lines)


def make_plan(config: RunConfig, shape: ModelShape, longest_prompts: Sequence[int]) -> Plan:
    """The plan for a model, and prompts (the student's) of at most so many tokens in each task."""
    cuda = config.device == "cuda"
    width = WIDTH[config.dtype]
    weights = shape.parameters * width / GIB

    def engines(role: str) -> tuple[Part, ...]:
        e = config.actors.of(role)
        # Weights twice for a moment while they are replaced (the snapshot is mapped), the KV cache, logits of a batch.
        memory = ENGINE_BASE_GIB + 2 * weights + (0 if cuda else e.cpu_cache_gib)
        gpus = e.gpus if cuda else 0
        return tuple(Part(f"{role} engine {i}", e.cpus, gpus, memory, e.labels) for i in range(e.replicas))

    one = config.learner
    tasks = zip(config.tasks, longest_prompts, strict=True)
    forwards = [_largest_forward(task, longest) for task, longest in tasks]
    teacher, stages = teacher_of(config), len(forwards)
    memory = max(learner_gib(one, teacher, config.dtype, shape, *forward, stages) for forward in forwards)
    gpus = one.gpus if cuda else 0
    learners = tuple(Part(f"learner rank {i}", one.cpus, gpus, memory, one.labels) for i in range(one.ranks))
    pools = [(role, config.actors.of(role)) for role in roles(config)]
    growing = {role: e.most for role, e in pools if e.most > e.replicas}
    return Plan(engines("student"), engines("teacher") if "teacher" in roles(config) else (), learners, growing)


def _largest_forward(config: TaskConfig, longest_prompt: int) -> tuple[int, int, int]:
    """Of a rank's largest forward if every answer is as long as it may be: tokens, those in the loss, a sequence's."""
    sequence = longest_prompt + config.sampling.max_new_tokens
    share = -(-config.training.batch_size * config.sampling.generations // config.learner.ranks)
    sequences = max(1, min(share, config.learner.micro_batch_tokens // sequence))
    return sequences * sequence, sequences * config.sampling.max_new_tokens, sequence


def roles(config: RunConfig) -> tuple[str, ...]:
    """Whose engines are started: with a live teacher the students score too, and without one nobody does."""
    return ("student",) if teacher_of(config).weights == "live" else ("student", "teacher")


def engine_settings(config: RunConfig, model: Path, role: str) -> EngineSettings:
    """How an engine of this role is started. Student engines also evaluate, and score when the teacher is live."""
    e = config.actors.of(role)
    longest_answer = max([t.sampling.max_new_tokens for t in config.tasks] + [s.max_new_tokens for s in config.sets])
    max_model_len = max(task.data.max_teacher_prompt_tokens for task in config.tasks) + longest_answer + 1
    shape = json.loads((model / "config.json").read_text())
    limit = shape.get("max_position_embeddings")
    if limit is not None and max_model_len > limit:
        raise UserError(
            f"data.max_teacher_prompt_tokens and the longest answer add up to {max_model_len} tokens, but the model in "
            f"{model} has {limit} positions; lower data.max_teacher_prompt_tokens or max_new_tokens"
        )
    cache = _cache_bytes_per_token(shape, WIDTH[config.dtype]) * max_model_len / GIB
    if config.device == "cpu" and cache > e.cpu_cache_gib:
        raise UserError(
            f"actors.{role}.kv_cache_gib is {e.cpu_cache_gib:g}, but one sequence of {max_model_len} tokens "
            f"(data.max_teacher_prompt_tokens and the longest answer) needs {cache:.2g} GiB; raise it"
        )
    cache_gib = e.cpu_cache_gib if config.device == "cpu" else e.kv_cache_gib
    # Correct engines: up to 1e-5 and, of models that were trained for long, 0.04; other weights: 0.4 and more.
    default_gap = 0.001 if config.dtype == "float32" else 0.08
    return EngineSettings(
        model=str(model),
        dtype=config.dtype,
        device=config.device,
        max_model_len=max_model_len,
        max_logprobs=max(task.loss.top_k for task in config.tasks),
        max_num_seqs=e.max_num_seqs,
        hold=config.strict,
        alone=config.strict and e.most == 1,
        share_prompts=any(task.sampling.generations > 1 for task in config.tasks),
        gpu_memory_utilization=e.gpu_memory_utilization if cache_gib is None else FREE_AT_LEAST,
        enforce_eager=e.enforce_eager,
        max_probe_gap=config.weights.max_probe_gap or default_gap,
        threads=e.threads,
        kv_cache_gib=cache_gib,
    )


def _cache_bytes_per_token(shape: dict[str, Any], width: int) -> int:
    """Keys and values of one token in all layers, by config.json; 0 if it names its shape otherwise."""
    heads = shape.get("num_key_value_heads") or shape.get("num_attention_heads")
    layers, hidden = shape.get("num_hidden_layers"), shape.get("hidden_size")
    if not (heads and layers and hidden):
        return 0
    size = shape.get("head_dim") or hidden // shape["num_attention_heads"]
    return int(2 * layers * heads * size * width)
