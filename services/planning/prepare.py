"""Prepare a run from its configuration, before a process is started: model, data, prompts, schedule, plan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sdft.services.base.errors import UserError
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.config.sinks import check_sinks
from sdft.services.data.check_files import check_files
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record, load_questions
from sdft.services.data.pairs import PromptPair
from sdft.services.data.prompts import build_prompts, check_ids, text_prompts
from sdft.services.data.schedule import make_schedule
from sdft.services.data.sets import LoadedSet
from sdft.services.data.tokenizer import load_tokenizer, vocabulary_of
from sdft.services.data.watched import watched
from sdft.services.grading.grade import answer_check
from sdft.services.grading.judge import check_judge
from sdft.services.planning.derived import Derived, derived
from sdft.services.planning.engines import check_environments, check_own_engines
from sdft.services.planning.examined import examined
from sdft.services.planning.fingerprint import fingerprint_of
from sdft.services.planning.guard import check_guard
from sdft.services.planning.models import check_positions, check_trainable, resolve_model
from sdft.services.planning.plan import engine_settings, pools
from sdft.services.planning.planned import planned
from sdft.services.planning.prepared import Prepared, Stage
from sdft.services.planning.routing import replays_experts
from sdft.services.planning.shape import ModelShape, embedding_rows, read_headers, sample_of_weights
from sdft.services.planning.sources import SAMPLE, Loaded, Questions, check_ends, load_rows, make_source
from sdft.services.planning.split import check_shared
from sdft.services.planning.supports import check_engines_score, check_supports
from sdft.services.planning.teacher import check_same_tokens, external_teachers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKED = 100  # demonstrations whose length is checked


def prepare(config: RunConfig, path: Path, trains: bool = True, begun: datetime | None = None) -> Prepared:
    """Check everything; UserError lists the problems. Relative paths start at the config file's folder.

    trains: the model is trained, not only evaluated. begun: the start time of a resumed run (`checkpoints.begun`), for
    chat templates that write the date.
    """
    base, begun = path.parent, begun or datetime.now()
    if config.service is not None:
        raise UserError(f"{path}: it has the section service; start it by `sdft serve {path}`")
    check_sinks(config.monitoring)
    check_files(config, base)
    check_own_engines(config)
    check_engines_score(config)
    check_environments(config)
    loaded = [
        load_rows(task, base, _questions(stage_sets, base, config))
        for task, stage_sets in zip(config.tasks, [s.sets for s in config.stages] or [()], strict=True)
    ]
    common = _questions(config.evaluation.sets, base, config)
    for s in config.sets:
        if s.judge is not None:
            check_judge(s.name, s.judge)
    use = derived(resolve_model(config.model, base), config.device, config.dtype, trains)
    model, teachers = use.folder, external_teachers(config, base) if trains else {}
    with _copy_is_named(use), examined(model, trains) as found:
        if trains:
            check_trainable(model, config.device, config.dtype)
        # Raises when the model or the cache is too short for the prompts.
        folders = {name: teachers.get(name, model) for name in pools(config)}
        tokens = max(engine_settings(config, folder, pool).max_model_len for pool, folder in folders.items())
        if trains:
            check_positions(model, tokens)
        prepared = _prepared(config, path, model, teachers, loaded, common, begun)
        if trains:
            check_supports(config, prepared.vocabulary)
    if trains:
        check_shared(config.learner, found, model)
    if found.divides and config.learner.ranks > 1 and config.learner.zero_stage == 3:
        raise UserError(
            f"learner.zero_stage is 3 with {config.learner.ranks} ranks, and layers of the model in {model} compute "
            f"the sequences of a pack one by one, which ranks with other numbers of sequences cannot do at that stage; "
            f"set learner.zero_stage: 2"
        )
    replays = trains and replays_experts(config, found.routed, found.divides)
    return replace(prepared, alone=found.alone, replays_experts=replays, model_notes=use.notes)


@contextmanager
def _copy_is_named(use: Derived) -> Iterator[None]:
    """Name the folder that the user gave in errors about a copy of it."""
    try:
        yield
    except UserError as error:
        if use.notes and str(use.folder) in str(error):
            raise UserError(f"{error} ({use.folder} is a copy: {'; '.join(use.notes)})") from None
        raise


def _prepared(
    config: RunConfig,
    path: Path,
    model: Path,
    teachers: Mapping[str, Path],
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
    vocabulary = vocabulary_of(tokenizer, rows)
    identity = (model / "config.json").read_bytes() + sample_of_weights(headers)  # of the model
    of_teachers = {}
    for pool, folder in sorted(teachers.items()):
        check_same_tokens(tokenizer, pool, folder)
        found = read_headers(folder)
        identity += (folder / "config.json").read_bytes() + sample_of_weights(found)
        of_teachers[pool] = ModelShape.of(folder, found, None)
    builders = [prompt_builder(task, tokenizer, base, begun) for task in config.tasks]
    alone = [prompt_builder(task, tokenizer, base, begun, alone=True) for task in config.tasks]
    given_builders = zip(loaded, builders, alone, strict=True)
    sources, contexts = zip(*(make_source(*given, rows, base) for given in given_builders), strict=True)
    schedules = make_schedule(config.tasks, sources).stages
    check_ends(names, schedules)
    check_guard(config, schedules)
    first = [SAMPLE if source.grows else source.records[0] for source in sources]
    for task, builder, record in zip(config.tasks, builders, first, strict=True):
        check_answers_are_shown(task, builder, record)
    lacks = [builders[0].lacks_first(first[0]), *(None for _ in names[1:])]  # the same for all stages
    guard = config.retention
    phrases = guard.detectors.phrases if guard is not None and guard.detectors is not None else ()
    stages: list[Stage] = []
    for i, (name, given, builder, source) in enumerate(zip(names, loaded, builders, sources, strict=True)):
        task, before = given.task, stages[-1].fingerprint if stages else ""
        stages.append(
            Stage(
                name=name,
                config=task,
                source=source,
                contexts=contexts[i],
                sets=_sets(given.questions, tokenizer, builder, task, task.environment, rows),
                schedule=schedules[i],
                fingerprint=fingerprint_of(before, task, identity, () if source.grows else source.prompts),
                watched=watched(tokenizer, builder, first[i], phrases),
                recalled=len(given.recalled),
                warnings=tuple(
                    filter(None, (source.trouble, _short(builder, source.records, task), _unanswered(given), lacks[i]))
                ),
            )
        )
    ends = dict.fromkeys(i for builder, record in zip(builders, first, strict=True) for i in builder.stop_ids(record))
    check_ids(first[:1], [PromptPair.of([builders[0].end(first[0]).token_id], None)], rows)
    shape = ModelShape.of(model, headers, config.learner.lora)
    longest = [
        stage.config.data.max_prompt_tokens if stage.source.grows else max(len(p.student_ids) for p in stage.prompts)
        for stage in stages
    ]
    config, plan = planned(config, shape, longest, of_teachers)
    return Prepared(
        config=config,
        path=path.resolve(),
        model=model,
        shape=shape,
        tokenizer=tokenizer,
        stop_ids=tuple(ends),
        vocabulary=vocabulary,
        stages=tuple(stages),
        common=_sets(common, tokenizer, builders[0], stages[0].config, config.environment, rows),
        plan=plan,
        begun=begun,
        teachers=teachers,
        sample_ids=builders[0].student(SAMPLE) if sources[0].grows else [],
    )


def environment_of(s: EvaluationSet, of_task: EnvironmentConfig | None) -> EnvironmentConfig | None:
    """Return the environment of an evaluation set; None if its questions have single replies."""
    return (s.environment or of_task) if s.grader == "environment" else None


def check_answers_are_shown(task: TaskConfig, builder: PromptBuilder, record: Record) -> None:
    """UserError if the chat template does not show what an environment answers a reply."""
    if task.environment is not None:
        roles = ("user", "tool") if task.environment.type == "mcp" else ("user",)
        for role in roles:
            builder.between(record, [{"role": role, "content": "It is done."}])


def prompt_builder(
    task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", base: Path, begun: datetime, alone: bool = False
) -> PromptBuilder:
    """Return the builder of a task's prompts. alone: the teacher sees the student's prompt."""
    d = task.data
    template, teacher = ("none", d.student_variables) if alone else (d.template, d.teacher_variables)
    fallback = None if alone else d.fallback_template
    return PromptBuilder(tokenizer, template, base, d.system, begun, d.student_variables, teacher, fallback)


def _questions(sets: Sequence[EvaluationSet], base: Path, config: RunConfig) -> Questions:
    teachers = tuple(config.teacher_in_use.models)
    return [(s, load_questions(s, base, answer_check(s), teachers)) for s in sets]


def _short(builder: PromptBuilder, items: Sequence[Record], task: TaskConfig) -> str | None:
    """Return a warning if more than half of a sample of demonstrations has at most method.skip_first tokens."""
    skipped = task.method.skipped
    checked = [item for item in items[:: max(1, len(items) // CHECKED)] if item.demonstration is not None]
    short = sum(builder.length(item) <= skipped for item in checked)
    if 2 * short <= len(checked):
        return None
    return (
        f"{short} of {len(checked)} demonstrations that were checked have at most method.skip_first ({skipped}) "
        f"tokens, and so short a rollout has no token in the loss; lower method.skip_first, or train on longer "
        f"demonstrations"
    )


def _unanswered(given: Loaded) -> str | None:
    """Return a warning if logged conversations have nothing that is trained."""
    if not given.unanswered:
        return None
    return f"conversations in which no user's message follows a reply, so that they are not trained: {given.unanswered}"


def _limits(task: TaskConfig) -> tuple[int, int]:
    return task.data.max_prompt_tokens, task.data.max_teacher_prompt_tokens


def _sets(
    questions: Questions,
    tokenizer: "PreTrainedTokenizerBase",
    builder: PromptBuilder,
    task: TaskConfig,
    environment: EnvironmentConfig | None,
    rows: int | None,
) -> list[LoadedSet]:
    """Build the prompts of the questions with the task's settings.

    environment: of sets that name none. rows: rows of the model's embedding.
    """
    limits = _limits(task)
    loaded = []
    for s, items in questions:
        prompts = text_prompts(tokenizer, items, limits[1]) if s.is_text else build_prompts(builder, items, *limits)
        check_ids(items, prompts, rows)
        loaded.append(LoadedSet(s, items, prompts, builder, environment_of(s, environment)))
    return loaded
