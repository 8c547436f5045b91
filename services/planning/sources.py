"""The sources of a run's stages: the rows of the configuration, with the prompts that the tokenizer makes of them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sdft.services.algorithms.base import Contexts
from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.config.run import TaskConfig
from sdft.services.data.contexts import PromptBuilder, shown_to_teacher
from sdft.services.data.demonstrations import Record, load_conversations, load_demonstrations, spread
from sdft.services.data.messages import Message
from sdft.services.data.pairs import PromptPair
from sdft.services.data.prompts import build_prompts, check_ids
from sdft.services.data.record_contexts import RecordContexts
from sdft.services.data.schedule import StageSchedule
from sdft.services.data.sources.base import PromptSource
from sdft.services.data.sources.fixed import FixedSource
from sdft.services.data.sources.open import open_source
from sdft.services.grading.graders import GRADERS

# Takes the place of a record where a source that grows may have none yet: the end of a reply, the probe.
SAMPLE = Record(
    id="sample",
    messages=(
        Message(role="user", content="Name the days of the week, the months of the year, and a city by the sea."),
    ),
    demonstration="Monday is a day, May a month.",
    context=None,
    feedback=None,
    answer=None,
    where="data.template",
)
Questions = list[tuple[EvaluationSet, list[Record]]]
Build = Callable[[Sequence[Record]], list[PromptPair]]


@dataclass(frozen=True)
class Loaded:
    """The rows of one task that are known without the tokenizer."""

    task: TaskConfig
    demonstrations: list[Record]  # empty for a source that grows
    recalled: list[Record]  # prompts that the algorithm trains beside the demonstrations
    questions: Questions  # of the task's own evaluation sets
    unanswered: int = 0  # logged conversations of which nothing is trained


def load_rows(task: TaskConfig, base: Path, questions: Questions) -> Loaded:
    """Load and check the rows of the files that a task names, relative to the folder `base`. Raises UserError."""
    demonstrations, unanswered, teachers = list[Record](), 0, tuple(task.teacher_in_use.models)
    if not task.data.grows and task.method.from_conversations:
        demonstrations, unanswered = load_conversations(task.data, base, needed_columns(task, base), teachers)
    elif not task.data.grows:
        demonstrations = load_demonstrations(task.data, base, needed_columns(task, base), teachers)
    check = answer_check(task)
    for record in demonstrations:
        if (problem := check(record.answer)) is not None:
            raise UserError(f"{record.where}: answer: {problem} (method.grader: {task.method.graded_by})")
    return Loaded(task, demonstrations, _recalled(task, base), questions, unanswered)


def _recalled(task: TaskConfig, base: Path) -> list[Record]:
    if task.method.recalled is None:
        return []
    file, count = task.method.recalled
    teachers = tuple(task.teacher_in_use.models)
    return spread(load_demonstrations(DataConfig(train=file), base, ["teacher"] if teachers else [], teachers), count)


def make_source(
    given: Loaded, builder: PromptBuilder, alone: PromptBuilder, rows: int | None, base: Path
) -> tuple[PromptSource, Callable[[int], Contexts]]:
    """Return the source of a task, and a function from a record's index to its contexts.

    alone: builder that shows the teacher the prompt only, for recalled prompts, whose records come last.
    rows: rows of the model's embedding.
    """
    task, count = given.task, len(given.demonstrations)
    reply = task.sampling.max_new_tokens if task.method.trains_demonstrations else None
    build = partial(_build, builder, task, reply, rows)
    source: PromptSource
    if task.data.grows:
        steps = task.training.steps
        most = sys.maxsize if steps is None else steps * task.training.batch_size
        needed = ("prompt", *needed_columns(task, base))
        logs, teachers = task.method.from_conversations, tuple(task.teacher_in_use.models)
        source = open_source(task.data, base, needed, build, most, answer_check(task), logs, teachers)
    else:
        prompts = build(given.demonstrations) + _build(alone, task, None, rows, given.recalled)
        source = FixedSource(task.data.train, [*given.demonstrations, *given.recalled], prompts)

    def contexts(index: int) -> Contexts:
        of_record = builder if task.data.grows or index < count else alone
        return RecordContexts(of_record, source.records[index], task.data.max_teacher_prompt_tokens)

    return source, contexts


def check_ends(names: Sequence[str], schedules: Sequence[StageSchedule]) -> None:
    """UserError unless every stage but the last has all its records: the steps behind it are counted from its end."""
    for name, schedule in zip(names[:-1], schedules[:-1], strict=True):
        if not schedule.end_is_known:
            raise UserError(
                f"{schedule.source.name}: stage {name} is not the last one, and its records are not all there; close "
                f'the source with the row {{"closed": true}}, or train the later stages in another run'
            )


def _build(
    builder: PromptBuilder, task: TaskConfig, reply: int | None, rows: int | None, records: Sequence[Record]
) -> list[PromptPair]:
    """Build and check the prompts of records. reply: longest demonstration; None: demonstrations are not trained."""
    data = task.data
    pairs = build_prompts(builder, records, data.max_prompt_tokens, data.max_teacher_prompt_tokens, reply)
    check_ids(records, pairs, rows)
    return pairs


def answer_check(task: TaskConfig) -> Callable[[Any], str | None]:
    """Return the check of a row's answer: by the rule that grades the student's replies, if one does."""
    rule = task.method.graded_by
    return (lambda answer: None) if rule is None else GRADERS[rule].check_answer


def needed_columns(task: TaskConfig, base: Path) -> list[str]:
    """Return the columns that the task's rows need besides the prompt; "a|b" means one of both. Raises UserError."""
    method, needed = task.method, list[str]()
    # Of recalled prompts each names its teacher, and the rows beside them have none.
    routed = ["teacher"] if task.teacher_in_use.models and method.recalled is None else []
    if method.trains_demonstrations:
        if task.data.fallback_template is not None:
            raise UserError(
                f"data.fallback_template: method {method.type} trains demonstrations, so every row needs one; remove "
                f"the key"
            )
        needed.append("demonstration")
        if not method.needs_context:
            return [*needed, *routed]
    column = shown_to_teacher(task.data, base)
    if method.from_conversations and "feedback" not in (column or "").split("|"):
        raise UserError(
            f"data.template: {task.data.template} does not show the teacher what users said next, and method "
            f"{method.type} learns from that; set data.template or data.fallback_template to feedback"
        )
    if method.needs_context and column is not None and column not in needed:
        needed.append(column)
    return [*needed, *(["answer"] if method.graded_by is not None else []), *routed]
