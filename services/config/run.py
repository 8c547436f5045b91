"""The whole configuration of a run. Imports neither torch, ray nor vllm."""

from typing import Literal

from pydantic import Field, model_validator

from sdft.actors.config import ActorsConfig, Dtype, SamplingConfig
from sdft.learner.config import LearnerConfig, TeacherConfig
from sdft.services.algorithms.registry import Method
from sdft.services.algorithms.sdft import Sdft
from sdft.services.base.section import Section
from sdft.services.config.data import DataConfig
from sdft.services.config.dtype import native_dtype
from sdft.services.config.environment import Environment
from sdft.services.config.evaluation import EvaluationConfig, EvaluationSet, RetentionConfig
from sdft.services.config.sections import (
    CheckpointConfig,
    MonitoringConfig,
    RayConfig,
    StageConfig,
    TrainingConfig,
    WeightsConfig,
)
from sdft.services.config.service import ServiceConfig
from sdft.services.config.together import devices, episodes, guard, tasks, versions

CHECKS = (tasks.check, episodes.check, guard.check, devices.check, versions.check)


class RunConfig(Section):
    """The configuration of a whole run."""

    model: str = Field(description="A built-in name (smollm2-135m), a local folder or a hub id")
    method: Method = Field(
        Sdft(),
        description="The algorithm: sdft, off_policy, sft, dft, recall, sdpo, hindsight, mix, or one of your own as "
        "package.module:Name; with settings: {type: sdft, skip_first: 0}",
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Device of engines and learner")
    dtype: Dtype = Field(
        # Resolved here, so that everything computed from the configuration, and every saved copy, has the dtype in use.
        default_factory=lambda data: native_dtype(data.get("device", "cpu")),
        description="auto, the default: bfloat16 on a GPU or a processor with instructions for it, else float32",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the order of the data and of sampling")
    run_dir: str | None = Field(None, description="null: runs/<name of the config file>")
    data: DataConfig | None = Field(None, description="The demonstrations; null: each of `stages` has its own")
    stages: tuple[StageConfig, ...] = Field((), description="Tasks that one model is trained on, one after the other")
    sampling: SamplingConfig = SamplingConfig()
    environment: Environment | None = Field(
        None, description="What answers the student's replies, so that a sample has several; null: one reply each"
    )
    training: TrainingConfig
    teacher: TeacherConfig = TeacherConfig()
    learner: LearnerConfig = LearnerConfig()
    actors: ActorsConfig = ActorsConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    retention: RetentionConfig | None = Field(None, description="null: no retention guard")
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    ray: RayConfig = RayConfig()
    service: ServiceConfig | None = Field(
        None, description="Settings of `sdft serve`, whose records come over HTTP: without data.train and a length"
    )

    @property
    def strict(self) -> bool:
        """Whether each batch is sampled with the weights of the step before: the same bits in every run."""
        return self.training.max_staleness == 0

    @property
    def tasks(self) -> "tuple[TaskConfig, ...]":
        """The run's stages, each as the configuration of a run of its own; the run itself if it has no stages."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        if not self.stages:
            return (TaskConfig.model_construct(**settings),)
        return tuple(TaskConfig.model_construct(**settings | _of_stage(self, stage)) for stage in self.stages)

    @property
    def places(self) -> list[str]:
        """The keys under which the tasks' settings stand, in the order of `tasks`."""
        return [f"stages[{i}]." for i in range(len(self.stages))] or [""]

    @property
    def teacher_in_use(self) -> TeacherConfig:
        """The teacher's settings: live weights, without a copy, if no stage is scored."""
        scored = any(task.method.teacher_scores for task in self.tasks)
        return self.teacher if scored else TeacherConfig(weights="live")

    @property
    def sets(self) -> tuple[EvaluationSet, ...]:
        """All evaluation sets: the run's, then those of its stages."""
        return (*self.evaluation.sets, *(s for stage in self.stages for s in stage.sets))

    @property
    def guarded(self) -> tuple[str, ...]:
        """Names of the sets under the retention guard."""
        if self.retention is None or self.retention.max_drop is None:
            return ()
        return self.retention.sets or tuple(s.name for s in self.sets if s.role == "retention")

    @model_validator(mode="after")
    def _together(self) -> "RunConfig":
        for check in CHECKS:
            check(self)
        return self


class TaskConfig(RunConfig):
    """One stage of a run, as the configuration of a run of its own."""

    data: DataConfig
    keep_moments: bool = False

    @property
    def longest_reply(self) -> int:
        """Most tokens behind a prompt: of a reply, or of an episode."""
        if self.environment is not None:
            return self.environment.max_tokens
        return self.method.prefix_tokens + self.sampling.max_new_tokens


def _of_stage(run: RunConfig, stage: StageConfig) -> dict[str, object]:
    """Return the settings with which a stage replaces those of the run."""
    given = {
        name: value for name in ("method", "sampling", "environment") if (value := getattr(stage, name)) is not None
    }
    training = run.training.model_copy(update={"epochs": stage.epochs, "steps": stage.steps})
    learner = run.learner
    if stage.optimizer is not None:
        learner = learner.model_copy(update={"optimizer": stage.optimizer})
    return given | {
        "data": stage.data,
        "stages": (),
        "training": training,
        "learner": learner,
        "keep_moments": stage.keep_moments,
    }
