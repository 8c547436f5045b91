"""Mix: which samples have the expert's tokens, what is trained of them, and which settings and rows are refused."""

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.types import SampleId
from sdft.services.algorithms.base import Group
from sdft.services.algorithms.mix import EXPERT, Mix, OfPrefix, OfTeacher
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import sample_seed
from sdft.services.data.sources.fixed import FixedSource
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.records.ledger import Ledger
from sdft.services.training.rollouts import Batch, Rollouts
from simulation import virtual_time
from simulation.cluster import Case, Teacher, pool
from simulation.cluster import Student as SimulatedStudent
from simulation.cluster import prepared as simulated
from tests.runs.run import write_run
from tests.services.algorithms.test_hindsight import STUDENT, TEACHER, Engines
from tests.services.algorithms.test_sdpo import Texts

SHOWN = np.asarray([6, 7, 8, 9], np.int32)  # the demonstration, with the token that ends it


def group(n: int, **more: Any) -> Group:
    samples = tuple(SampleId(0, 0, record, 0) for record in range(n))
    return Group(1, samples, tuple(sample_seed(0, s) for s in samples), STUDENT, TEACHER, SHOWN, Texts(), **more)


def made(method: Mix, of: Group) -> tuple[list[Draft], Engines, Engines]:
    """Return the drafts, and the student's and the teacher's engines."""
    student, teacher = Engines(), Engines()
    return asyncio.run(method.make(of, student, teacher)), student, teacher


def test_the_share_is_that_of_the_samples_and_the_same_each_time() -> None:
    of = group(2000)
    drafts, student, _ = made(Mix(share=0.25), of)
    mixed = {draft.sample for draft in drafts if draft.objective == EXPERT}
    assert abs(len(mixed) / 2000 - 0.25) < 0.03
    assert len(student.asked) == 2000 - len(mixed)
    assert {draft.sample for draft in drafts} == set(of.samples)
    again, _, _ = made(Mix(share=0.25), group(1000))  # a sample is drawn by itself
    assert {draft.sample for draft in again if draft.objective == EXPERT} == {s for s in mixed if s.record < 1000}


def test_the_demonstration_is_trained_as_sft_does() -> None:
    method = Mix(share=0.5, skip_first=1)
    drafts, _, _ = made(method, group(40))
    expert = [draft for draft in drafts if draft.objective == EXPERT]
    (turn,) = expert[0].turns
    assert (turn.completion.rollout.completion_ids.tolist(), turn.scores) == (SHOWN.tolist(), None)
    assert (expert[0].loss_tokens, expert[0].student_loss_tokens) == (4, 0)
    assert [loss.name for loss in method.losses] == ["forward", "nll"]
    assert method.losses[EXPERT].importance.level == "off"


def test_the_teachers_completion_is_trained_as_off_policy_does() -> None:
    method = Mix(share=0.5, expert=OfTeacher(), skip_first=1)
    drafts, _, teacher = made(method, group(40))
    expert = [draft for draft in drafts if draft.objective == EXPERT]
    assert teacher.asked == [TEACHER.tolist()] * len(expert)
    assert teacher.shown == [TEACHER.tolist()] * 40
    assert {(d.loss_tokens, d.student_loss_tokens, d.oldest_version) for d in expert} == {(3, 0, 0)}
    assert [loss.importance.level for loss in method.losses] == ["sequence", "off"]
    assert not method.trains_demonstrations


@pytest.mark.parametrize(
    ("tokens", "mask", "prefix", "trained"),
    [
        (1, None, [6], 3),
        (2, None, [6, 7], 4),
        (9, None, [6, 7, 8], 4),  # not the token that ends the demonstration
        (9, [True, True, False, True], [6], 3),  # of the first reply of several
    ],
)
def test_the_student_goes_on_behind_a_prefix(
    tokens: int, mask: list[bool] | None, prefix: list[int], trained: int
) -> None:
    method = Mix(share=0.5, expert=OfPrefix(tokens=tokens), skip_first=2)
    of = group(40, demonstration_mask=None if mask is None else np.asarray(mask))
    drafts, student, teacher = made(method, of)
    begun = [draft for draft in drafts if len(draft.turns[0].context_ids) > len(STUDENT)]
    assert 10 < len(begun) < 30
    assert student.asked.count([*STUDENT, *prefix]) == len(begun)
    assert teacher.shown.count([*TEACHER, *prefix]) == len(begun)
    assert {d.loss_tokens for d in begun} == {trained}  # skip_first counts from the start of the reply
    assert all(d.turns[0].context_ids.tolist() == [*STUDENT, *prefix] and d.objective == 0 for d in begun)
    assert len(method.losses) == 1
    assert {d.student_loss_tokens for d in begun} == {trained}


class Teaching(Teacher):
    """A simulated teacher that also samples."""

    def __init__(self, number: int, case: Case) -> None:
        super().__init__(number)
        self._samples = SimulatedStudent(number, case)

    def generate(self, items: Any, argument: Any) -> Any:
        return self._samples.generate(items, argument)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("expert", ["demonstration", "teacher", {"type": "prefix", "tokens": 2}])
def test_groups_whose_samples_need_other_calls_make_one_batch(tmp_path: Path, staleness: int, expert: Any) -> None:
    """Two samples of each record, so that the samples of a record have different calls of the engines."""
    case = Case("mix", engines=2, staleness=staleness, steps=1)

    async def run() -> tuple[Batch, dict[str, int]]:
        students = pool(case, "student", 2, lambda number: SimulatedStudent(number, case))
        teachers = pool(case, "teacher", 1, lambda number: Teaching(number, case))
        await asyncio.gather(students.start(), teachers.start())
        one = simulated(case, 8)
        (stage,) = one.stages
        changed = {"method": {"type": "mix", "share": 0.5, "expert": expert}, "sampling": {"generations": 2}}
        (task,) = RunConfig.model_validate(one.config.model_dump() | changed).tasks
        pairs = [PromptPair.of([1], [2], SHOWN.tolist())] * 1000
        source = FixedSource("simulated.jsonl", [], pairs)
        stage = replace(
            stage, config=task, source=source, schedule=replace(stage.schedule, generations=2, source=source)
        )
        ledger = Ledger(tmp_path / "ledger.sqlite")

        async def ready() -> None: ...

        rollouts = Rollouts(replace(one, stages=(stage,)), students, {"": teachers}, ledger, ready, 0)
        rollouts.open(stage.schedule)
        rollouts.begin(0)
        batch = await rollouts.take(1)
        await asyncio.gather(students.stop(), teachers.stop())
        return batch, ledger.counts()

    batch, counts = virtual_time.run(run())
    mixed = {draft.sample for draft in batch.drafts if random.Random(draft.seed).random() < 0.5}
    records = [{draft.sample in mixed for draft in batch.drafts if draft.sample.record == r} for r in range(1000)]
    assert counts == {"scored": 16}
    assert {True, False} in records
    begun = {draft.sample for draft in batch.drafts if draft.objective == EXPERT or len(draft.turns[0].context_ids) > 1}
    assert begun == mixed


def prepared(folder: Path, model: Path, method: dict[str, Any], **changed: Any) -> Prepared:
    config = write_run(folder, model, "float32")
    settings = yaml.safe_load(config.read_text())
    settings |= {"method": {"type": "mix", "divergence": {"top_k": 16}} | method}
    settings["data"] |= changed
    settings["sampling"]["max_new_tokens"] = 40
    config.write_text(yaml.safe_dump(settings))
    return prepare(load_config(config), config)


@pytest.mark.usefixtures("unexamined")
def test_a_row_has_the_teachers_prompt_and_the_demonstrations_tokens(tiny_model: Path, tmp_path: Path) -> None:
    for expert, longest in (("demonstration", 40), ({"type": "prefix", "tokens": 7}, 47)):
        run = prepared(tmp_path, tiny_model, {"expert": expert})
        pair = run.stages[0].prompts[0]
        assert pair.teacher_ids is not None
        assert pair.demonstration_ids is not None
        assert run.tokenizer.decode(pair.demonstration_ids) == "The number is 0.<|im_end|>"
        assert run.stages[0].config.longest_reply == longest


@pytest.mark.usefixtures("unexamined")
def test_a_row_needs_what_the_teacher_is_shown_and_a_demonstration_that_is_trained(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "facts.jsonl").write_text(json.dumps({"prompt": "Where?", "context": "Karth is on the Ombra."}) + "\n")
    data = {"train": "facts.jsonl", "template": "context"}
    assert len(prepared(tmp_path, tiny_model, {"expert": "teacher"}, **data).stages[0].prompts) == 1
    with pytest.raises(UserError, match=r"facts\.jsonl:1: demonstration is missing"):
        prepared(tmp_path, tiny_model, {"expert": "demonstration"}, **data)
    with pytest.raises(UserError, match=r"train\.jsonl:1: context is missing"):
        prepared(tmp_path, tiny_model, {"expert": "demonstration"}, template="context")
    with pytest.raises(UserError, match="method mix trains demonstrations, so every row needs one; remove the key"):
        prepared(tmp_path, tiny_model, {"expert": "prefix"}, fallback_template="feedback")


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"share": 1}, "method.share must be less than 1, not 1"),
        ({"expert": "student"}, "method.expert must be demonstration or teacher or prefix, not the text"),
        ({"expert": {"type": "teacher", "tokens": 4}}, "method.expert.tokens is not a setting with type: teacher"),
        ({"expert": {"type": "prefix", "tokens": 0}}, "method.expert.tokens must be at least 1, not 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(tmp_path: Path, method: dict[str, Any], said: str) -> None:
    path = tmp_path / "my.yaml"
    least = {"model": "m", "data": {"train": "t.jsonl"}, "training": {"steps": 1}}
    path.write_text(json.dumps(least | {"method": {"type": "mix"} | method}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert said in str(error.value)


def test_an_override_completes_the_short_form_of_the_expert(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    least = {"model": "m", "data": {"train": "t.jsonl"}, "training": {"steps": 1}}
    path.write_text(json.dumps(least | {"method": {"type": "mix", "expert": "prefix"}}))
    method = load_config(path, ["method.expert.tokens=3"]).method
    assert isinstance(method, Mix)
    assert method.expert == OfPrefix(tokens=3)
