"""Settings of pools and engines. Imports neither torch, ray nor vllm, so a config can be checked in milliseconds."""

import difflib
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sdft.actors.roles import ROLES, STUDENT, TEACHER, Role, RoleName

VLLM = "vllm"  # the built-in engine
NAME = r"[a-z0-9_-]+"  # of a pool
TURN_ENGINE = "sdft.services.serving.turns.client:TurnEngine"  # the engine of a service, for its windows
TURNS = "SDFT_TURNS"  # environment variable: the socket of that engine
Execution = Literal["eager", "graphs", "compiled"]  # of a model's operations in an engine
PREFILL = {"cpu": 2048, "cuda": 16384}  # tokens of prompts in one forward of an engine, at least
SCORED_AT_ONCE = 1024  # rows of a prompt whose logits an engine on a GPU computes at once, as vLLM itself does
LEARNER = "learner"  # names the learner beside the pools, as in pids.json


class PoolConfig(BaseModel):
    """A pool: what its engines do, their number and their resources."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: RoleName | None = Field(None, description="What the engines do; null: what the name of the pool says")
    engine: str = Field(VLLM, description="vllm, or a class of your own as package.module:Name")
    replicas: int = Field(1, ge=1, description="Number of engines of the pool; with max_replicas the least")
    max_replicas: int | None = Field(
        None, ge=1, description="The pool grows to as many while the learner waits for it; null: it does not grow"
    )
    # Half a Ray CPU: in strict mode the roles take turns, so three of them fit a two-core laptop.
    cpus: float = Field(0.5, gt=0, description="Ray CPUs reserved by each engine")
    gpus: float = Field(1, ge=0, description="GPUs of each engine, or a part of one; used with device: cuda only")
    tensor_parallel: int = Field(
        1,
        ge=1,
        description="GPUs that one engine is split over, each of which it reserves; on a CPU as many processes",
    )
    labels: dict[str, str] = Field(
        {}, description="Only on nodes of a running cluster that have these labels (ray start --labels)"
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="OpenMP threads of a CPU engine, of all its processes together; null: every core of the node",
    )
    kv_cache_gib: float | None = Field(
        None,
        gt=0,
        description="GiB of an engine's KV cache; null: 1 on a CPU, on a GPU what gpu_memory_utilization leaves for it",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory an engine may use if kv_cache_gib is null; null: 0.9, as such an engine "
        "has a GPU of its own",
    )
    max_num_seqs: int = Field(64, ge=1, description="Sequences decoded at once")
    execution: Execution | None = Field(
        None,
        description="eager, graphs (CUDA graphs of the decoding steps; GPUs only) or compiled (rollouts on a CPU take "
        "a tenth less, the start 45 s more); null: graphs on a GPU, eager on a CPU",
    )
    sleep: bool = Field(
        False,
        description="The engines leave their GPU memory to the learner while it steps, and keep the weights in the "
        "host's; strict runs on GPUs only",
    )
    start_timeout_s: float = Field(600, gt=0, description="How long an engine may take to start")
    health_timeout_s: float = Field(120, gt=0, description="An engine that answers nothing for so long is replaced")
    max_restarts: int = Field(3, ge=0, description="Losses of an engine within an hour before the run gives up")
    drain_timeout_s: float = Field(
        120, gt=0, description="How long an engine that leaves may finish its work before others do it again"
    )

    @model_validator(mode="after")
    def _engine(self) -> "PoolConfig":
        if self.engine != VLLM and ":" not in self.engine:
            raise ValueError(
                f"engine {self.engine} is not known; set it to {VLLM}, or to a class of your own as package.module:Name"
            )
        return self

    @model_validator(mode="after")
    def _sizes(self) -> "PoolConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than replicas {self.replicas}, which is the pool's least; "
                f"raise it, or leave it out for a pool of one size"
            )
        return self

    @model_validator(mode="after")
    def _threads(self) -> "PoolConfig":
        if self.threads is not None and self.threads % self.tensor_parallel:
            raise ValueError(
                f"threads {self.threads} cannot be divided among the {self.tensor_parallel} processes of "
                f"tensor_parallel; set threads to a multiple of {self.tensor_parallel}, or remove it"
            )
        return self

    @property
    def gpus_of_engine(self) -> float:
        """GPUs that an engine reserves with device: cuda."""
        return self.gpus * self.tensor_parallel

    @property
    def cpu_cache_gib(self) -> float:
        """GiB of KV cache of a CPU engine."""
        return self.kv_cache_gib or 1

    @property
    def most(self) -> int:
        """Upper bound on the number of engines in the pool."""
        return self.max_replicas or self.replicas


class ActorsConfig(BaseModel):
    """The pools by name. With live teacher weights the student engines score too and `teacher` is not started.

    With teacher.models each teacher has a pool of its own with the settings of `teacher`.

    A further pool has a name of your own and `role: evaluation`: its engines get the student's weights before each
    evaluation, and the evaluation sets run on them instead of on the student engines.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, PoolConfig]

    student: PoolConfig = PoolConfig()
    teacher: PoolConfig = PoolConfig()
    batch_timeout_s: float = Field(
        1800,
        gt=0,
        description="How long the engines may take for a batch: a step's rollouts, its scores, or an evaluation set",
    )

    @property
    def pools(self) -> dict[str, PoolConfig]:
        """Every pool by its name: student, teacher, then the further ones."""
        return {STUDENT: self.student, TEACHER: self.teacher, **self.__pydantic_extra__}

    def entry(self, pool: str) -> str:
        """The name under which a pool's settings stand: those of each of several teachers stand under `teacher`."""
        return TEACHER if pool not in self.pools and pool.startswith(f"{TEACHER}-") else pool

    def settings(self, pool: str) -> PoolConfig:
        """The settings of the pool with this name; KeyError for a name that is no pool."""
        return self.pools[self.entry(pool)]

    def role_name(self, pool: str) -> str:
        """The name of the role of the pool with this name; KeyError for a name that is no pool."""
        return self.settings(pool).role or self.entry(pool)

    def role(self, pool: str) -> Role:
        """The role of the pool with this name; KeyError for a name that is no pool."""
        return ROLES[self.role_name(pool)]

    @model_validator(mode="after")
    def _names_and_roles(self) -> "ActorsConfig":
        for name, pool in self.__pydantic_extra__.items():
            if pool.role is None and name not in ROLES:
                near = difflib.get_close_matches(name, type(self).model_fields, n=1)
                meant = f"did you mean {near[0]}? A" if near else "a"
                raise ValueError(f"{name} has no role; {meant} further pool needs role: evaluation")
            if name == LEARNER:
                raise ValueError(f"{name} is not a name for a pool, because it names the learner; choose another")
            if not re.fullmatch(NAME, name):
                raise ValueError(f"{name} is not a name for a pool; use lower-case letters, digits, - and _")
        of_role: dict[str, str] = {}
        for name in self.pools:
            role = self.role_name(name)
            if name in ROLES and name != role:
                raise ValueError(f"{name}.role must be {name}, not {role}; remove it, or use another name for the pool")
            if role in of_role:
                raise ValueError(
                    f"{of_role[role]} and {name} have the same role, {role}, and a run has one pool of each; remove "
                    f"{name}, or raise {of_role[role]}.replicas"
                )
            of_role[role] = name
            if not ROLES[role].trains and self.pools[name].max_replicas is not None:
                raise ValueError(
                    f"{name}.max_replicas lets a pool grow while the learner waits for its samples, and {role} engines "
                    f"make none; set {name}.replicas alone"
                )
        return self


class SamplingConfig(BaseModel):
    """How the student samples (sampling temperature 1 and top-p 1 are the published setting)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(256, ge=1, description="Longest completion in tokens")
    temperature: float = Field(
        1.0,
        gt=0,
        description="Temperature; the learner computes at 1, and importance weights correct another up to a cap",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="As temperature; tokens that it leaves out are never trained on")
    generations: int = Field(1, ge=1, description="Rollouts per prompt; more than one gave negligible gain")


Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class EngineSettings:
    """Settings that one engine is started with."""

    model: str  # local folder
    dtype: str
    device: str  # "cpu" or "cuda"
    max_model_len: int
    max_logprobs: int
    max_num_seqs: int
    hold_batches: bool  # until they are complete, and one batch at a time; otherwise requests start as they arrive
    share_prompts: bool  # compute a prompt once for all sequences that begin with it
    gpu_memory_utilization: float
    execution: Execution
    max_probe_gap: float
    threads: int | None  # OpenMP threads on the CPU, of all processes together; None: every core
    kv_cache_gib: float | None  # None, on GPUs: what gpu_memory_utilization leaves for it
    tensor_parallel: int = 1  # GPUs, or on a CPU processes, that hold a part of the model each
    engine: str = VLLM  # or a user's own class, package.module:Name
    exclusive: bool = False  # no other process of the run computes while this engine does
    stop_ids: tuple[int, ...] = ()  # tokens that end a reply; a completion contains the one that ended it
    serves: bool = False  # answers requests of users: with the model folder's sampling defaults and plain log-probs
    vocabulary: int | None = None  # tokens of the tokenizer; later rows are in no distribution. None: all rows are
    keep_experts: bool = False  # rollouts have the experts that the routers chose
    transport: str = "memory"  # weights.transport
    sleeps: bool = False  # `sleep` and `wake` are called
    pool: str = ""  # its name
    shared: bool = False  # it holds the weights of several owners, one after the other
    extension: str = "sdft.actors.vllm.extension.WorkerExtension"  # loaded in the engine's worker processes
