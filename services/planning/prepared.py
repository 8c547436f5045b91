"""A prepared run: stages, sources, evaluation sets, schedule and plan, and the settings of its learner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdft.actors.shared.types import IntArray
from sdft.learner.completions import Watched
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.services.algorithms.base import Contexts
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import Schedule, StageSchedule
from sdft.services.data.sets import LoadedSet
from sdft.services.data.sources.base import PromptSource
from sdft.services.planning.plan import Plan
from sdft.services.planning.shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 48


@dataclass(frozen=True)
class Stage:
    """One stage of a run, checked."""

    name: str  # "" in a run without stages
    config: TaskConfig
    source: PromptSource
    contexts: Callable[[int], Contexts]  # of the record at an index of the source
    sets: list[LoadedSet]  # evaluation sets of this stage
    schedule: StageSchedule
    fingerprint: str  # what must not change on resume, up to the end of this stage
    watched: Watched = field(default_factory=Watched)  # what is looked for in completions
    recalled: int = 0  # number of records that the algorithm recalls; they come last
    warnings: tuple[str, ...] = ()  # reasons why the stage may not learn

    @property
    def prompts(self) -> Sequence[PromptPair]:
        """Prompts of the records that are known, by their index in the source."""
        return self.source.prompts


@dataclass(frozen=True)
class Prepared:
    """A run, checked as far as possible without starting it."""

    config: RunConfig
    path: Path  # of the config file
    model: Path
    shape: ModelShape
    tokenizer: "PreTrainedTokenizerBase"
    stop_ids: tuple[int, ...]  # tokens that end a reply; the first one is what the chat template puts behind it
    vocabulary: int  # tokens of the tokenizer; engines and learner leave later rows of the head out
    stages: tuple[Stage, ...]
    common: list[LoadedSet]  # evaluation sets that belong to no stage
    plan: Plan
    begun: datetime  # local time; chat templates may write it into prompts
    sample_ids: list[int] = field(default_factory=list)  # prompt of SAMPLE, with the first stage's settings
    alone: str | None = None  # why the learner computes sequences one by one, as the end of a sentence; None: it packs
    replays_experts: bool = False  # the learner routes tokens to the experts that the sampler chose
    teachers: Mapping[str, Path] = field(default_factory=dict)  # folders of external teachers, by their pools' names
    model_notes: tuple[str, ...] = ()  # why `model` is not the folder that the configuration names, one sentence each

    def folder_of(self, pool: str) -> Path:
        """Return the model folder that the engines of a pool load."""
        return self.teachers.get(pool, self.model)

    @property
    def schedule(self) -> Schedule:
        """The schedule of all stages."""
        return Schedule(tuple(stage.schedule for stage in self.stages))

    @property
    def sets(self) -> list[LoadedSet]:
        """All evaluation sets."""
        return [*self.common, *(s for stage in self.stages for s in stage.sets)]

    @property
    def probe_ids(self) -> IntArray:
        """The probe: the first PROBE_TOKENS tokens, int32, of the longest of the first 32 prompts.

        A source that has no record yet gives the tokens of SAMPLE.
        """
        first = [p.student_ids if p.teacher_ids is None else p.teacher_ids for p in self.stages[0].prompts[:32]]
        return max(first or [np.asarray(self.sample_ids, np.int32)], key=len)[:PROBE_TOKENS]

    def at(self, step: int) -> Stage:
        """Return the stage of optimizer step `step`; the first stage for step 0."""
        return self.stages[self.schedule.at(step).stage]


def learner_settings(prepared: Prepared) -> LearnerSettings:
    """Return the settings of a run's learner."""
    c = prepared.config
    stages = tuple(
        StageSettings(
            before=stage.schedule.before,
            steps=_steps(stage),
            losses=stage.config.method.losses,
            optimizer=stage.config.learner.optimizer,
            keep_moments=stage.config.keep_moments,
            watched=stage.watched,
        )
        for stage in prepared.stages
    )
    return LearnerSettings(
        model=str(prepared.model),
        dtype=c.dtype,
        device=c.device,
        seed=c.seed,
        config=c.learner,
        stages=stages,
        teacher=c.teacher_in_use.of_learner,
        exclusive=c.strict and c.learner.ranks == 1,
        transport=c.weights.transport,
        vocabulary=prepared.vocabulary,
        frees_memory=any(pool.sleep for pool in c.actors.pools.values()),
        replay_experts=prepared.replays_experts,
    )


def _steps(stage: Stage) -> int | None:
    """Return the number of steps over which the learning rate goes.

    Of a source that grows, it is the setting: the end of the source is known too late, and changes no earlier step.
    """
    s = stage.schedule
    return stage.config.training.steps if stage.source.grows or s.last is None else s.last - s.before
