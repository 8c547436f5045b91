"""The smaller sections of a configuration, and its stages. Imports neither torch, ray nor vllm."""

import difflib
import os
from typing import Literal

from pydantic import Field, field_validator, model_validator

from sdft.actors.config import SamplingConfig
from sdft.actors.shared.own_code import is_own
from sdft.actors.transport.named import BUILT_IN, transport_class
from sdft.learner.config import OptimizerConfig
from sdft.services.algorithms.registry import Method
from sdft.services.base.section import Section
from sdft.services.config.data import DataConfig, check_length
from sdft.services.config.environment import Environment
from sdft.services.config.evaluation import EvaluationSet


class TrainingConfig(Section):
    """Length of training: `epochs` over the demonstrations, or a number of `steps`. With stages, each sets its own.

    With a data.source that is no file, the length is `steps`, or ends with the source.
    """

    batch_size: int = Field(32, ge=1, description="Prompts per optimizer step")
    epochs: int | None = Field(None, ge=1, description="Passes over the demonstrations; give this or steps")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or epochs")
    max_staleness: int = Field(
        0, ge=0, description="Steps that a rollout's weights may be behind; 0: the strict, synchronous algorithm"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give exactly one of epochs and steps")
        return self


class WeightsConfig(Section):
    """How often the engines get new weights, and how closely they must agree with the learner's."""

    sync_every: int = Field(1, ge=1, description="Optimizer steps between two updates of the student engines")
    teacher_sync_every: int = Field(1, ge=1, description="The same for the teacher engines; the EMA moves every step")
    swap: Literal["together", "one_by_one"] = Field(
        "together", description="Whether a role's engines pause for an update at the same time or in turn"
    )
    transport: str = Field(
        "memory",
        description="memory: each engine maps the snapshot; changes: the same, and other nodes get only what a version "
        "changes; broadcast: the learner sends it to all engines of a role; ipc (device: cuda only): engines copy it "
        "from the learner's GPU memory; or the import path of your own, as package.module:Name",
    )
    max_probe_gap: float | None = Field(
        None, gt=0, description="Largest relative gap of the probe; null: 0.001 in float32, 0.08 in bfloat16"
    )
    timeout_s: float = Field(300, gt=0, description="How long an engine may take to load and verify new weights")

    @field_validator("transport")
    @classmethod
    def _a_transport(cls, name: str) -> str:
        if is_own(name):
            transport_class(name)  # raises NotImportable
        elif name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            mend = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{name} is not {', '.join(BUILT_IN)} or the import path of your own, package.module:Name{mend}"
            )
        return name

    @model_validator(mode="after")
    def _all_at_once(self) -> "WeightsConfig":
        if self.transport == "broadcast" and self.swap == "one_by_one":
            raise ValueError(
                "transport: broadcast reaches all engines at once; set swap: together, or transport: memory"
            )
        return self


class StageConfig(Section):
    """One task of a stream of tasks. Method, sampling and optimizer default to those of the run."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Name of the stage, in lower case")
    data: DataConfig
    epochs: int | None = Field(None, ge=1, description="Passes over the stage's demonstrations; give this or steps")
    steps: int | None = Field(None, ge=1, description="Optimizer steps of the stage; give this or epochs")
    method: Method | None = Field(None, description="null: the run's")
    environment: Environment | None = Field(None, description="null: the run's")
    sampling: SamplingConfig | None = Field(None, description="null: the run's")
    optimizer: OptimizerConfig | None = Field(None, description="null: learner.optimizer")
    keep_moments: bool = Field(False, description="Keep AdamW's moments of the previous stage; false: from zero")
    sets: tuple[EvaluationSet, ...] = Field((), description="Evaluation sets of this task")

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        check_length(self.data, self.epochs, self.steps)
        return self


class CheckpointConfig(Section):
    """When to save, and how many checkpoints to keep. The last step is always saved."""

    every: int = Field(50, ge=1, description="Steps between two checkpoints")
    keep: int = Field(2, ge=1, description="Number of checkpoints kept; older ones are removed")
    timeout_s: float = Field(600, gt=0, description="How long a checkpoint may take to reach the disk")


class MonitoringConfig(Section):
    """Sinks for metrics beside metrics.jsonl, the stall notice, and the recording of rollouts."""

    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory")
    wandb_project: str | None = Field(None, description="Project of Weights & Biases to log to; null: none")
    mlflow_experiment: str | None = Field(None, description="MLflow experiment to log to; null: none")
    # Off: a run's own cluster uses ports that change with every run, so no Prometheus server is configured for them.
    prometheus: bool = Field(False, description="Serve metrics with those of the Ray node, for Prometheus to fetch")
    stall_s: float = Field(600, gt=0, description="Seconds in which no wait ends, after which the run prints its waits")
    record_rollouts: bool = Field(False, description="Keep every batch in rollouts/, for `sdft replay`")


class RayConfig(Section):
    """The Ray cluster: a running one (`address`, or RAY_ADDRESS in the environment), else one started by the run."""

    address: str | None = Field(
        None, description="Address of a running cluster; null: RAY_ADDRESS, else a cluster of the run's own"
    )
    wait_s: float = Field(300, gt=0, description="How long to wait for the cluster's resources")
    autoscaling: bool = Field(False, description="The cluster has an autoscaler: request nodes and wait for them")
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of a GPU of the cluster, which the plan must fit; null: of this machine's GPUs, and not "
        "known of a running cluster",
    )

    @property
    def running(self) -> str | None:
        """Address of the running cluster to use; None (Ray's "local"): the run starts its own."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address == "local" else address
