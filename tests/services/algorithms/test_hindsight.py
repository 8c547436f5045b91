"""Hindsight: who samples, what the teacher of each sample sees, and which settings are refused."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from sdft.actors.shared.drafts import Completion, Scores
from sdft.actors.shared.types import IntArray, Rollout, SampleId, Support, TeacherScores
from sdft.services.algorithms.base import Group
from sdft.services.algorithms.hindsight import Hindsight
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from tests.runs.run import write_run
from tests.services.algorithms.test_sdpo import Texts

STUDENT, TEACHER = np.asarray([1, 2], np.int32), np.asarray([3, 4, 5], np.int32)
TURNS = [
    {"role": "user", "content": "Say number 1."},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "No, number 1."},
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "Right."},
]


class Engines:
    """Student and teacher. Both note the prompts that they get."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.shown: list[list[int]] = []

    async def complete(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[Completion]:
        self.asked += [p.tolist() for p in prompts]
        rollouts = [
            Rollout(prompt, np.full(4, seed % 100, np.int32), np.zeros(4, np.float32), ((0, 0, 4),), "stop")
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return [Completion.of(rollout) for rollout in rollouts]

    async def tokens(self, completions: Sequence[Completion]) -> list[IntArray]:
        return [c.rollout.completion_ids for c in completions]

    async def rollouts(self, completions: Sequence[Completion]) -> list[Rollout]:
        return [c.rollout for c in completions]

    async def score(
        self, prompts: Sequence[IntArray], completions: Sequence[Completion], support: Support
    ) -> list[Scores]:
        self.shown += [p.tolist() for p in prompts]
        zero = np.zeros((4, support.k), np.float32)
        return [Scores(TeacherScores(zero.astype(np.int32), zero, zero[:, 0], 0), 0) for _ in completions]


def test_the_student_samples_and_the_teacher_scores_behind_what_was_said_next() -> None:
    engines, samples = Engines(), tuple(SampleId(0, 0, 0, g) for g in range(2))
    group = Group(1, samples, (7, 8), STUDENT, TEACHER, None, Texts())
    drafts = asyncio.run(Hindsight(skip_first=1).make(group, engines, engines))
    assert (engines.asked, engines.shown) == ([[1, 2]] * 2, [[3, 4, 5]] * 2)
    assert [draft.turns[0].context_ids.tolist() for draft in drafts] == [[1, 2]] * 2
    assert [draft.turns[0].completion.rollout.completion_ids[0] for draft in drafts] == [7, 8]
    assert {(draft.loss_tokens, draft.turns[0].completion.by_student) for draft in drafts} == {(3, True)}


def prepared(folder: Path, model: Path, rows: list[dict[str, Any]], **data: Any) -> Prepared:
    config = write_run(folder, model, "float32")
    settings = yaml.safe_load(config.read_text())
    settings |= {"method": {"type": "hindsight", "divergence": {"top_k": 16}}}
    settings["data"] |= {"train": "log.jsonl", "template": "feedback", "max_teacher_prompt_tokens": 250} | data
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.write_text(yaml.safe_dump(settings))
    return prepare(load_config(config), config)


@pytest.mark.usefixtures("unexamined")
def test_the_students_prompt_is_the_history_and_the_teachers_has_reply_and_next_message(
    tiny_model: Path, tmp_path: Path
) -> None:
    run = prepared(tmp_path, tiny_model, [{"messages": TURNS}, {"messages": TURNS[:2]}])
    (stage,) = run.stages
    texts = [[run.tokenizer.decode(ids) for ids in (p.student_ids, p.teacher_ids)] for p in stage.prompts]
    (first, first_taught), (second, second_taught) = texts
    assert "two" not in first
    assert "No, number 1." in second
    assert "Right." not in second
    assert "The response was:\ntwo\n\nThis was said about it:\nNo, number 1." in first_taught
    assert "The response was:\none\n\nThis was said about it:\nRight." in second_taught
    assert second_taught.index("two") < second_taught.index("The response was:")
    assert stage.warnings == (
        "conversations in which no user's message follows a reply, so that they are not trained: 1",
    )


@pytest.mark.usefixtures("unexamined")
@pytest.mark.parametrize("template", ["turn", "none"])
def test_a_template_that_shows_no_feedback_is_refused(tiny_model: Path, tmp_path: Path, template: str) -> None:
    said = f"data.template: {template} does not show the teacher what users said next, and method hindsight learns from"
    with pytest.raises(UserError, match=said):
        prepared(tmp_path, tiny_model, [{"messages": TURNS}], template=template)


@pytest.mark.usefixtures("unexamined")
def test_demonstrations_may_stand_beside_conversations(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "Say number 3.", "demonstration": "three"}, {"messages": TURNS}]
    run = prepared(tmp_path, tiny_model, rows, template="turn", fallback_template="feedback")
    texts = [run.tokenizer.decode(pair.teacher_ids) for pair in run.stages[0].prompts if pair.teacher_ids is not None]
    assert ["three" in text for text in texts] == [True, False, False]
    assert ["This was said about it" in text for text in texts] == [False, True, True]


def test_an_environment_is_refused() -> None:
    given = {"model": "m", "data": {"train": "t"}, "training": {"steps": 1}, "method": "hindsight"}
    with pytest.raises(ValidationError, match="method hindsight takes single replies"):
        RunConfig.model_validate(given | {"environment": {"type": "tests.fakes.environments:Counting"}})
