"""The whole configuration of a run. Imports neither torch, ray nor vllm."""

from typing import Literal

from pydantic import Field, model_validator

from sdft.actors.config import VLLM, ActorsConfig, Dtype, SamplingConfig
from sdft.actors.roles import teacher_pool
from sdft.learner.config import LearnerConfig, TeacherConfig
from sdft.services.algorithms.registry import Method
from sdft.services.algorithms.sdft import Sdft
from sdft.services.base.section import Section
from sdft.services.config.dtype import native_dtype
from sdft.services.config.environment import Environment
from sdft.services.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationSet,
    MonitoringConfig,
    RayConfig,
    RetentionConfig,
    StageConfig,
    TrainingConfig,
    WeightsConfig,
    check_length,
)
from sdft.services.config.service import ServiceConfig


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
    def _places(self) -> list[str]:
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

    @model_validator(mode="after")
    def _one_task_or_stages(self) -> "RunConfig":
        t = self.training
        if self.stages and (self.data is not None or t.epochs is not None or t.steps is not None):
            key = "data" if self.data is not None else "training.epochs or training.steps"
            raise ValueError(f"a run with stages must not set {key}; set it in each stage instead")
        if not self.stages and self.data is None:
            raise ValueError("data is required but missing; set data.train to the file of demonstrations")
        if self.data is not None:
            try:
                check_length(self.data, t.epochs, t.steps)
            except ValueError as error:
                raise ValueError(f"training: {error}") from None
        names_of = {"stages": [s.name for s in self.stages], "evaluation sets": [s.name for s in self.sets]}
        for plural, names in names_of.items():
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two {plural} have the same name, {twice}; rename one")
        return self

    @model_validator(mode="after")
    def _pools_of_teachers(self) -> "RunConfig":
        taken = next((pool for pool in map(teacher_pool, self.teacher.models) if pool in self.actors.pools), None)
        if taken is not None:
            raise ValueError(
                f"actors.{taken} has the name that the pool of a teacher in teacher.models gets; rename the pool, or "
                f"the teacher"
            )
        return self

    @model_validator(mode="after")
    def _one_clip(self) -> "RunConfig":
        clip = self.learner.optimizer.grad_clip
        for i, stage in enumerate(self.stages):
            if stage.optimizer is not None and stage.optimizer.grad_clip != clip:
                raise ValueError(
                    f"stages[{i}].optimizer.grad_clip {stage.optimizer.grad_clip:g} must equal "
                    f"learner.optimizer.grad_clip {clip:g}: the whole run has one value; change one of them"
                )
        return self

    @model_validator(mode="after")
    def _a_cosine_has_an_end(self) -> "RunConfig":
        places = [(f"stages[{i}].", "steps") for i in range(len(self.stages))] or [("", "training.steps")]
        for (place, key), task in zip(places, self.tasks, strict=True):
            unbounded = task.training.epochs is None and task.training.steps is None
            if unbounded and task.learner.optimizer.schedule == "cosine":
                raise ValueError(
                    f"{place}{key} is missing, so that the learning rate's cosine has no end; set it, or set "
                    f"learner.optimizer.schedule: constant"
                )
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> "RunConfig":
        for place, task in zip(self._places, self.tasks, strict=True):
            longest, skipped = task.sampling.max_new_tokens, task.method.skipped
            if longest <= skipped:
                raise ValueError(
                    f"{place}sampling.max_new_tokens {longest} must be more than {place}method.skip_first {skipped}, "
                    f"or no token is in the loss; raise max_new_tokens, or lower skip_first"
                )
            target = next((loss.length for loss in task.method.losses if loss.length is not None), None)
            if target is not None and target >= task.longest_reply:
                raise ValueError(
                    f"{place}method.length {target} has no effect: no completion is longer than {task.longest_reply} "
                    f"tokens; lower it, or remove it"
                )
            if task.method.recalled is not None and task.data.grows:
                raise ValueError(
                    f"{place}method {task.method.type} trains its prompts in each epoch, and a source that grows has "
                    f"none; set {place}data.source: file, or choose another method"
                )
            weights = task.method.teacher_weights
            if weights and self.teacher.weights not in weights:
                raise ValueError(
                    f"{place}method {task.method.type} needs teacher.weights: {' or '.join(weights)}, not "
                    f"{self.teacher.weights}; change one of them"
                )
        return self

    @model_validator(mode="after")
    def _episodes_are_taken(self) -> "RunConfig":
        for place, task in zip(self._places, self.tasks, strict=True):
            environment, method, n = task.environment, task.method, task.sampling.generations
            if n < method.least_generations:
                raise ValueError(
                    f"{place}sampling.generations {n} leaves method {method.type} nothing to learn from; set it to "
                    f"{method.least_generations} or more"
                )
            if method.needs_success and (environment is None) == (method.graded_by is None):
                mend = "set method.grader, or environment" if environment is None else "remove method.grader"
                raise ValueError(f"{place}method {method.type}: one of them says what has passed; {mend}")
            if method.needs_success and task.data.template in ("context", "feedback", "none"):
                raise ValueError(
                    f"{place}method {method.type} shows the teacher a sample as the demonstration, and data.template "
                    f"{task.data.template} shows none; set data.template: turn or paper"
                )
            if method.shows_feedback and environment is None:
                raise ValueError(f"{place}method {method.type}: feedback is of an environment; set environment")
            if method.shows_feedback and task.data.fallback_template != "feedback":
                raise ValueError(
                    f"{place}method {method.type}: no template shows feedback; set data.fallback_template: feedback"
                )
            if environment is None:
                continue
            if not method.plays:
                raise ValueError(
                    f"{place}environment: method {method.type} takes single replies; use method sdft, or remove "
                    f"environment"
                )
            if environment.max_tokens <= task.sampling.max_new_tokens:
                raise ValueError(
                    f"{place}environment.max_tokens {environment.max_tokens} must be more than "
                    f"{place}sampling.max_new_tokens {task.sampling.max_new_tokens}; raise it"
                )
            least = self.training.batch_size * task.sampling.generations if self.strict else task.sampling.generations
            if environment.concurrent < least:
                raise ValueError(
                    f"{place}environment.concurrent {environment.concurrent} is less than the {least} episodes that "
                    f"begin together; raise it"
                )
        return self

    @model_validator(mode="after")
    def _sets_have_environments(self) -> "RunConfig":
        own = [(s, self.environment) for s in self.evaluation.sets]
        own += [(s, stage.environment or self.environment) for stage in self.stages for s in stage.sets]
        for s, environment in own:
            if s.grader == "environment" and s.environment is None and environment is None:
                raise ValueError(
                    f"evaluation set {s.name}: grader environment needs an environment; set it in the set, or in the "
                    f"run"
                )
            played = (s.environment or environment) if s.grader == "environment" else None
            if played is not None and played.max_tokens <= s.max_new_tokens:
                raise ValueError(
                    f"evaluation set {s.name}: max_new_tokens {s.max_new_tokens} leaves no room for a second reply in "
                    f"environment.max_tokens {played.max_tokens}; lower it"
                )
        return self

    @model_validator(mode="after")
    def _guarded_sets_are_there(self) -> "RunConfig":
        if self.retention is not None and self.retention.max_drop is not None:
            names = [s.name for s in self.sets]
            missing = next((name for name in self.retention.sets if name not in names), None)
            if missing is not None:
                raise ValueError(
                    f"retention.sets: there is no evaluation set {missing}; the sets are {', '.join(names) or 'none'}"
                )
            if not self.guarded:
                raise ValueError(
                    "retention: no evaluation set has role: retention; add one, or name sets in retention.sets"
                )
        return self

    @property
    def guarded(self) -> tuple[str, ...]:
        """Names of the sets under the retention guard."""
        if self.retention is None or self.retention.max_drop is None:
            return ()
        return self.retention.sets or tuple(s.name for s in self.sets if s.role == "retention")

    @model_validator(mode="after")
    def _guarded_pass_at_is_sampled(self) -> "RunConfig":
        guarded = [s for s in self.sets if s.name in self.guarded]
        asked = self.retention is not None and self.retention.max_drop_pass_at is not None
        if asked and not any(s.pass_at for s in guarded):
            raise ValueError(
                "retention.max_drop_pass_at: no guarded set has pass_at; give it to one of them, or remove the key"
            )
        return self

    @model_validator(mode="after")
    def _a_gated_teacher_has_its_guard(self) -> "RunConfig":
        every, retention, check = self.teacher.refresh_every, self.retention, self.evaluation.every
        if every is None:
            return self
        if retention is None:
            raise ValueError(
                "teacher.weights gated needs the retention guard, which lets a refresh pass; set retention.detectors, "
                "or retention.max_drop"
            )
        if self.guarded and (check is None or check > every):
            raise ValueError(
                f"teacher.refresh_every {every} needs an evaluation of the guarded sets before each refresh; set "
                f"evaluation.every to at most {every}"
            )
        if retention.detectors is not None and every < 2 * retention.detectors.window:
            raise ValueError(
                f"teacher.refresh_every {every} is less than two windows of retention.detectors, which compare nothing "
                f"before; raise it to {2 * retention.detectors.window}, or lower window"
            )
        if self.weights.teacher_sync_every != 1:
            raise ValueError(
                "weights.teacher_sync_every has no effect with teacher.weights gated, whose refreshes are sent at "
                "once; remove it"
            )
        return self

    @model_validator(mode="after")
    def _sleep_is_possible(self) -> "RunConfig":
        for name, pool in self.actors.pools.items():
            if not pool.sleep:
                continue
            why = {
                "needs device: cuda, because it frees memory of a GPU": self.device == "cpu",
                f"needs training.max_staleness 0, because with {self.training.max_staleness} the engines compute while "
                f"the learner steps": not self.strict,
                f"works with vLLM's engines only, and actors.{name}.engine is {pool.engine}": pool.engine != VLLM,
            }
            if reason := next((text for text, holds in why.items() if holds), None):
                raise ValueError(f"actors.{name}.sleep {reason}; remove it")
        return self

    @model_validator(mode="after")
    def _transport_is_possible(self) -> "RunConfig":
        own = [name for name, pool in self.actors.pools.items() if pool.engine != VLLM]
        if self.weights.transport == "ipc" and self.device == "cpu":
            raise ValueError(
                "weights.transport ipc passes memory of the learner's GPU, and device is cpu; set it to memory or "
                "broadcast, or set device: cuda"
            )
        if self.weights.transport == "ipc" and own:
            raise ValueError(
                f"weights.transport ipc works with vLLM's engines only, and actors.{own[0]}.engine is a class of your "
                f"own; set it to memory, or remove engine"
            )
        return self

    @model_validator(mode="after")
    def _engines_can_be_split(self) -> "RunConfig":
        split = {f"actors.{name}": pool for name, pool in self.actors.pools.items() if pool.tensor_parallel > 1}
        for place, pool in split.items():
            if self.device == "cuda" and pool.gpus != 1:
                raise ValueError(
                    f"{place}.gpus {pool.gpus:g} is not possible with {place}.tensor_parallel {pool.tensor_parallel}, "
                    f"because each part of an engine has a whole GPU; remove gpus"
                )
            if self.weights.transport in ("broadcast", "ipc"):
                raise ValueError(
                    f"weights.transport {self.weights.transport} sends to engines that are whole, and "
                    f"{place}.tensor_parallel is {pool.tensor_parallel}; set weights.transport: memory, or "
                    f"tensor_parallel: 1"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if self.weights.sync_every > self.training.max_staleness + 1:
            raise ValueError(
                f"weights.sync_every {self.weights.sync_every} lets rollouts be {self.weights.sync_every - 1} steps "
                f"behind; set training.max_staleness to {self.weights.sync_every - 1}, or weights.sync_every to "
                f"{self.training.max_staleness + 1}"
            )
        grows = [name for name, pool in self.actors.pools.items() if pool.most > pool.replicas]
        if grows and self.strict:
            raise ValueError(
                f"actors.{grows[0]}.max_replicas lets the number of engines change, which would change the bits of a "
                f"strict run; set training.max_staleness to 1 or more, or remove max_replicas"
            )
        teacher_every, retention = self.weights.teacher_sync_every, self.retention
        saved = {"checkpoint.every": self.checkpoint.every}
        if retention is not None and retention.action == "stop" and self.evaluation.every:
            saved["evaluation.every"] = self.evaluation.every  # the guard saves a checkpoint where it stops the run
        for key, every in saved.items():
            if self.strict and self.teacher.weights == "ema" and every % teacher_every:
                raise ValueError(
                    f"{key} {every} must be a multiple of weights.teacher_sync_every {teacher_every}, or a run resumed "
                    f"from a checkpoint has a newer teacher than an uninterrupted run"
                )
        stops = retention is not None and retention.action == "stop" and retention.detectors is not None
        if self.strict and self.teacher.weights == "ema" and stops and teacher_every > 1:
            raise ValueError(
                f"retention.detectors stop the run at any step, so weights.teacher_sync_every {teacher_every} must be "
                f"1, or a run resumed from there has a newer teacher; change it, or retention.action"
            )
        if self.dtype == "bfloat16" and self.learner.zero_stage == 0:
            raise ValueError(
                "learner.zero_stage 0 keeps no float32 masters of bfloat16 weights; set it to 1 (the same cost on "
                "one rank) or dtype to float32"
            )
        if self.learner.offload and self.device == "cpu":
            raise ValueError(
                "learner.offload keeps the optimizer's state in the host's memory, where device: cpu keeps it too; "
                "remove it"
            )
        engines = {f"actors.{name}": pool.execution for name, pool in self.actors.pools.items()}
        if self.service is not None:
            engines["service.serving"] = self.service.serving.execution
        for place, execution in engines.items():
            if execution == "graphs" and self.device == "cpu":
                raise ValueError(
                    f"{place}.execution graphs means CUDA graphs, and device is cpu; set it to eager or compiled"
                )
        for name, pool in self.actors.pools.items() if self.device == "cuda" else ():
            if pool.gpus % 1 and pool.kv_cache_gib is None:
                raise ValueError(
                    f"actors.{name}.gpus {pool.gpus:g} lets several processes share a GPU, so that an engine cannot "
                    f"measure its free memory; set actors.{name}.kv_cache_gib"
                )
        rollouts = min(self.training.batch_size * task.sampling.generations for task in self.tasks)
        groups = self.learner.ranks // self.learner.sequence_parallel
        if groups > rollouts:
            each = f" / learner.sequence_parallel {self.learner.sequence_parallel}" * (groups < self.learner.ranks)
            raise ValueError(
                f"learner.ranks {self.learner.ranks}{each} must not exceed the {rollouts} rollouts of a step "
                f"(training.batch_size times sampling.generations), or some ranks have no work"
            )
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
