"""Settings of the vLLM engines. Imports neither torch, ray nor vllm, so a config can be checked in milliseconds."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """One role's engines: how many, and what each may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=1, description="Number of engines of this role")
    # Half a Ray CPU: in strict mode the roles take turns, so three of them fit a two-core laptop.
    cpus: float = Field(0.5, gt=0, description="Ray CPUs reserved by each engine")
    gpus: float = Field(1, ge=0, description="GPUs of each engine; used with device: cuda only")
    threads: int | None = Field(None, ge=1, description="OpenMP threads of a CPU engine; null: every core of the node")
    kv_cache_gib: float = Field(1, gt=0, description="GiB of KV cache of a CPU engine")
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1, description="Share of a GPU's memory an engine may use")
    max_num_seqs: int = Field(64, ge=1, description="Sequences decoded at once")
    enforce_eager: bool = Field(True, description="false compiles the model: faster steps, a longer start")
    start_timeout_s: float = Field(600, gt=0, description="How long an engine may take to start")
    health_timeout_s: float = Field(120, gt=0, description="An engine that answers nothing for so long is replaced")
    max_restarts: int = Field(3, ge=0, description="Losses of an engine within an hour before the run gives up")


class ActorsConfig(BaseModel):
    """The two pools. With live teacher weights the student engines score too and `teacher` is not started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    student: EngineConfig = EngineConfig()
    teacher: EngineConfig = EngineConfig()


class SamplingConfig(BaseModel):
    """How the student samples (sampling temperature 1 and top-p 1 are the published setting)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(256, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    generations: int = Field(1, ge=1, description="Rollouts per prompt; more than one gave negligible gain")


Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class EngineSettings:
    """What one engine is started with."""

    model: str  # local folder
    dtype: str
    device: str  # "cpu" or "cuda"
    max_model_len: int
    max_logprobs: int
    max_num_seqs: int
    gpu_memory_utilization: float
    enforce_eager: bool
    max_probe_gap: float
    threads: int | None  # OpenMP threads on the CPU; None: every core
    kv_cache_gib: float | None  # None on GPUs, where gpu_memory_utilization says it
    extension: str = "actors.engine.WorkerExtension"  # loaded in the engine's worker processes
