"""Prepare a run from its configuration, before a process is started: model, data, prompts, schedule, plan."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdft.actors.shared.process import available_memory_gib
from sdft.actors.shared.types import IntArray
from sdft.learner.types import LearnerSettings, StageSettings
from sdft.services.algorithms.base import Contexts
from sdft.services.base.errors import PreflightError
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.config.sections import EvaluationSet
from sdft.services.config.sinks import check_sinks
from sdft.services.data.check_files import check_files
from sdft.services.data.contexts import (
    PromptBuilder,
    PromptPair,
    build_prompts,
    check_ids,
    text_prompts,
)
from sdft.services.data.demonstrations import Record, load_questions
from sdft.services.data.schedule import Schedule, StageSchedule, make_schedule
from sdft.services.data.sets import LoadedSet
from sdft.services.data.sources.base import PromptSource
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.grading.grade import answer_check
from sdft.services.grading.judge import check_judge
from sdft.services.planning.engines import check_own_engines
from sdft.services.planning.examined import examined
from sdft.services.planning.fingerprint import fingerprint_of
from sdft.services.planning.models import check_positions, check_trainable, resolve_model
from sdft.services.planning.plan import Plan, engine_settings, make_plan, pools
from sdft.services.planning.shape import ModelShape, embedding_rows, read_headers, sample_of_weights
from sdft.services.planning.sources import SAMPLE, Loaded, Questions, check_ends, load_rows, make_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 48
CHECKED = 100  # demonstrations whose length is checked
CHECKPOINT_BYTES_PER_PARAMETER = 20  # float32 masters, two moments, EMA, and the student in float32 at most


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
    reply_end: int  # the token that ends a reply in the chat template; engines stop at it
    stages: tuple[Stage, ...]
    common: list[LoadedSet]  # evaluation sets that belong to no stage
    plan: Plan
    begun: datetime  # local time; chat templates may write it into prompts
    sample_ids: list[int] = field(default_factory=list)  # prompt of SAMPLE, with the first stage's settings

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
        first = [p.teacher_ids or p.student_ids for p in self.stages[0].prompts[:32]] or [self.sample_ids]
        return np.asarray(max(first, key=len)[:PROBE_TOKENS], dtype=np.int32)

    def at(self, step: int) -> Stage:
        """Return the stage of optimizer step `step`; the first stage for step 0."""
        return self.stages[self.schedule.at(step).stage]


def prepare(config: RunConfig, path: Path, trains: bool = True, begun: datetime | None = None) -> Prepared:
    """Check everything; UserError lists the problems. Relative paths start at the config file's folder.

    trains: the model is trained, not only evaluated. begun: the start time of a resumed run (`checkpoints.begun`), for
    chat templates that write the date.
    """
    base, begun = path.parent, begun or datetime.now()
    check_sinks(config.monitoring)
    check_files(config, base)
    check_own_engines(config)
    loaded = [
        load_rows(task, base, _questions(stage_sets, base))
        for task, stage_sets in zip(config.tasks, [s.sets for s in config.stages] or [()], strict=True)
    ]
    common = _questions(config.evaluation.sets, base)
    for s in config.sets:
        if s.judge is not None:
            check_judge(s.name, s.judge)
    model = resolve_model(config.model, base)
    with examined(model, trains):
        if trains:
            check_trainable(model)
        # Raises when the model or the cache is too short for the prompts.
        tokens = max(engine_settings(config, model, pool).max_model_len for pool in pools(config))
        if trains:
            check_positions(model, tokens)
        return _prepared(config, path, model, loaded, common, begun)


def _prepared(
    config: RunConfig,
    path: Path,
    model: Path,
    loaded: Sequence[Loaded],
    common: Questions,
    begun: datetime,
) -> Prepared:
    """The part that needs the tokenizer. loaded: the rows of each task."""
    base = path.parent
    tokenizer = load_tokenizer(model)
    names = [s.name for s in config.stages] or [""]
    headers = read_headers(model)
    rows = embedding_rows(headers)  # every token id must be below it
    identity = (model / "config.json").read_bytes() + sample_of_weights(headers)  # of the model
    builders = [PromptBuilder(tokenizer, task.data.template, base, task.data.system, begun) for task in config.tasks]
    alone = [PromptBuilder(tokenizer, "none", base, task.data.system, begun) for task in config.tasks]
    given_builders = zip(loaded, builders, alone, strict=True)
    sources, contexts = zip(*(make_source(*given, rows, base) for given in given_builders), strict=True)
    schedules = make_schedule(config.tasks, sources).stages
    check_ends(names, schedules)
    stages: list[Stage] = []
    for i, (name, given, builder, source) in enumerate(zip(names, loaded, builders, sources, strict=True)):
        task, before = given.task, stages[-1].fingerprint if stages else ""
        stages.append(
            Stage(
                name=name,
                config=task,
                source=source,
                contexts=contexts[i],
                sets=_sets(given.questions, tokenizer, builder, task, rows),
                schedule=schedules[i],
                fingerprint=fingerprint_of(before, task, identity, () if source.grows else source.prompts),
                recalled=len(given.recalled),
                warnings=tuple(filter(None, (source.trouble, _short(builder, source.records, task)))),
            )
        )
    first = SAMPLE if sources[0].grows else sources[0].records[0]
    end = builders[0].end(first).token_id
    check_ids([first], [PromptPair([end], None)], rows)
    shape = ModelShape.of(model, headers, config.learner.lora)
    longest = [
        stage.config.data.max_prompt_tokens if stage.source.grows else max(len(p.student_ids) for p in stage.prompts)
        for stage in stages
    ]
    return Prepared(
        config=config,
        path=path.resolve(),
        model=model,
        shape=shape,
        tokenizer=tokenizer,
        reply_end=end,
        stages=tuple(stages),
        common=_sets(common, tokenizer, builders[0], stages[0].config, rows),
        plan=make_plan(config, shape, longest),
        begun=begun,
        sample_ids=builders[0].student(SAMPLE) if sources[0].grows else [],
    )


def _questions(sets: Sequence[EvaluationSet], base: Path) -> Questions:
    return [(s, load_questions(s, base, answer_check(s))) for s in sets]


def _short(builder: PromptBuilder, items: Sequence[Record], task: TaskConfig) -> str | None:
    """Return a warning if more than half of a sample of demonstrations has at most method.skip_first tokens."""
    skipped = task.method.skipped
    checked = [item for item in items[:: max(1, len(items) // CHECKED)] if item.demonstration is not None]
    short = sum(len(builder.demonstration(item)) <= skipped for item in checked)
    if 2 * short <= len(checked):
        return None
    return (
        f"{short} of {len(checked)} demonstrations that were checked have at most method.skip_first ({skipped}) "
        f"tokens, and so short a rollout has no token in the loss; lower method.skip_first, or train on longer "
        f"demonstrations"
    )


def _limits(task: TaskConfig) -> tuple[int, int]:
    return task.data.max_prompt_tokens, task.data.max_teacher_prompt_tokens


def _sets(
    questions: Questions,
    tokenizer: "PreTrainedTokenizerBase",
    builder: PromptBuilder,
    task: TaskConfig,
    rows: int | None,
) -> list[LoadedSet]:
    """Build the prompts of the questions with the task's settings. rows: rows of the model's embedding."""
    limits = _limits(task)
    loaded = []
    for s, items in questions:
        prompts = text_prompts(tokenizer, items, limits[1]) if s.is_text else build_prompts(builder, items, *limits)
        check_ids(items, prompts, rows)
        loaded.append(LoadedSet(s, items, prompts))
    return loaded


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
        teacher=c.teacher_in_use,
        exclusive=c.strict and c.learner.ranks == 1,
        transport=c.weights.transport,
    )


def _steps(stage: Stage) -> int | None:
    """Return the number of steps over which the learning rate goes.

    Of a source that grows, it is the setting: the end of the source is known too late, and changes no earlier step.
    """
    s = stage.schedule
    return stage.config.training.steps if stage.source.grows or s.last is None else s.last - s.before


def check_memory(config: RunConfig, plan: Plan) -> None:
    """PreflightError if the plan does not fit this machine's memory. Not checked on a running cluster or on GPUs."""
    free = available_memory_gib()
    if config.ray.running is None and config.device == "cpu" and plan.memory_gib > free:
        raise PreflightError(
            f"the run needs about {plan.memory_gib:.1f} GiB of memory, but {free:.1f} GiB are free here; lower "
            f"actors.*.kv_cache_gib, set teacher.weights: live (one engine fewer), or use a smaller model"
        )


def check_disk(prepared: Prepared, run_dir: Path) -> None:
    """PreflightError if the checkpoints do not fit the disk of the run directory, which must exist."""
    keep = prepared.config.checkpoint.keep + 1  # the newest is written before the oldest is removed
    shape = prepared.shape
    trained = shape.adapters or shape.parameters
    needed = (trained * CHECKPOINT_BYTES_PER_PARAMETER + 4 * shape.adapted) * keep
    disk = shutil.disk_usage(run_dir).free
    if needed > disk:
        raise PreflightError(
            f"{run_dir}: {keep} checkpoints take up to {needed / 1e9:.1f} GB, but {disk / 1e9:.1f} GB are free there; "
            f"free disk space, lower checkpoint.keep, or choose another --run-dir"
        )
