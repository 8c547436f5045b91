"""`sdft eval`: replies that are graded again, and pass@k of sampled replies."""

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from sdft.actors.shared.types import GenerateRequest, Rollout, Sampling
from sdft.services.cli.main import main
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sets import LoadedSet
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.evaluation.replies import write_replies
from sdft.services.fleet.pool import EnginePool
from sdft.services.records.rows import EvalResult, Reply

CONFIG = """
model: none
data: {train: train.jsonl}
training: {steps: 1}
evaluation: {sets: [{name: sums, file: sums.jsonl, grader: GRADER}]}
"""


@pytest.fixture
def replies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two replies graded by `exact`, one of them right."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": "a", "prompt": "2 + 2?", "answer": "4"}, {"id": "b", "prompt": "3 + 3?", "answer": "6"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded = [
        Reply(7, "sums", "a", "2 + 2?", "4", "4", True),
        Reply(7, "sums", "b", "3 + 3?", "6", "It is 6.", False),
    ]
    write_replies(tmp_path / "replies.jsonl", [EvalResult(7, 0, "sums", "accuracy", 0.5, 2)], graded)
    return tmp_path / "replies.jsonl"


def evaluate(grader: str, *more: str) -> int:
    Path("my.yaml").write_text(CONFIG.replace("GRADER", grader))
    return main(["eval", "my.yaml", "--regrade", "replies.jsonl", *more])


def test_replies_are_graded_again_by_another_grader(replies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("exact") == 0
    assert "50.0 %  n 2" in capsys.readouterr().out
    assert evaluate("exact, rows: 1") == 0  # grades all replies of the file, however many rows the set has now
    assert "50.0 %  n 2" in capsys.readouterr().out
    assert evaluate("numeric", "--out", "again.jsonl") == 0
    assert "100 %  n 2" in capsys.readouterr().out
    result, *again = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert result == {"step": 7, "stage": 0, "task": "sums", "metric": "accuracy", "value": 1.0, "n": 2}
    assert [reply["correct"] for reply in again] == [True, True]


def test_results_are_printed_even_if_replies_cannot_be_written(
    replies: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(".again.jsonl.part").mkdir()
    assert evaluate("exact", "--out", "again.jsonl") == 3
    said = capsys.readouterr()
    assert "50.0 %  n 2" in said.out
    assert "--out again.jsonl: the results and replies could not be written ([Errno 21]" in said.err


def test_results_that_cannot_be_printed_cost_no_replies(
    replies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert evaluate("exact", "--out", "again.jsonl") == 3
    assert "sdft: the output cannot be written (No space left on device)" in capsys.readouterr().err
    assert len(Path("again.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda text: text.replace('"sums"', '"products"'), "the set products, which the configuration does not have"),
        (lambda text: text.replace('"id": "b"', '"id": "z"'), "question z of sums, which is not in the set's file"),
        (lambda text: text + "{", "replies.jsonl:4: not JSON"),
        (lambda text: text + '{"id": 5}', "replies.jsonl:4: not a reply"),
        (lambda text: text.splitlines()[0], "the file has no replies"),
        (
            lambda text: text + text.replace('"step": 7', '"step": 40'),
            "replies.jsonl: the replies are of several steps (7, 40); give a file with the replies of one step",
        ),
    ],
)
def test_replies_to_other_questions_are_refused(
    replies: Path, capsys: pytest.CaptureFixture[str], spoil: object, words: str
) -> None:
    assert callable(spoil)
    replies.write_text(spoil(replies.read_text()))
    assert evaluate("exact") == 2
    assert words in capsys.readouterr().err


def test_regrade_together_with_a_model_is_refused(replies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("exact", "--model", "folder") == 2
    assert "without a model; remove --regrade or --model" in capsys.readouterr().err


class Letters:
    """A pool that replies with a letter by the seed, and its tokenizer: a third of the sampled replies are A."""

    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "ABC"[ids[0]]

    async def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        assert (sampling.temperature == 0.0) == all(r.seed is None for r in requests)
        return [
            Rollout(r.prompt_ids, np.asarray([(r.seed or 0) % 3]), np.zeros(1, np.float32), ((0, 0, 1),), "stop")
            for r in requests
        ]


def test_pass_at_k_grows_with_k_and_does_not_depend_on_the_step() -> None:
    settings = EvaluationSet(name="letters", file="f", grader="exact", pass_at=(1, 4, 16), pass_samples=64)
    questions = [Record(f"q{i}", (Message(role="user", content="?"),), None, None, None, "A", "f:1") for i in range(50)]
    loaded = LoadedSet(settings, questions, [PromptPair.of([1], None)] * 50)
    evaluator = Evaluator(Letters(), 60, print)

    def results(step: int) -> dict[str, float]:
        rows, _ = asyncio.run(evaluator.students(cast(EnginePool, Letters()), [loaded], step, 0))
        assert {row.n for row in rows} == {50}
        return {row.metric: row.value for row in rows}

    found = results(1)
    assert found["accuracy"] == 1.0
    for k in (1, 4, 16):
        assert found[f"pass@{k}"] == pytest.approx(1 - (2 / 3) ** k, abs=0.03)
    assert results(9) == found


def test_the_teacher_is_asked_as_often_as_the_student_with_its_own_prompt() -> None:
    class Leading(Letters):
        """Replies A to every prompt with a demonstration, token 2."""

        async def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Rollout]:
            assert all(r.prompt_ids.tolist() == [2, 1] for r in requests)
            return await super().generate([r._replace(seed=0) for r in requests], replace(sampling, temperature=1.0))

    settings = EvaluationSet(name="letters", file="f", grader="exact", pass_at=(1, 4), pass_samples=8)
    question = Record("q", (Message(role="user", content="?"),), None, None, None, "A", "f:1")
    shown, alone = (LoadedSet(settings, [question], [PromptPair.of([1], ids)]) for ids in ([2, 1], None))
    said: list[str] = []
    rows = asyncio.run(
        Evaluator(Letters(), 60, said.append).teachers({"": cast(EnginePool, Leading())}, [alone, shown], 0, 0)
    )
    assert [(row.label, row.value) for row in rows] == [
        ("letters (teacher)", 1.0),
        ("letters pass@1 (teacher)", 1.0),
        ("letters pass@4 (teacher)", 1.0),
    ]
    assert said == ["letters (teacher): 1 questions", "letters (teacher): 8 replies for pass@k"]


def test_each_of_several_teachers_is_asked_its_questions_and_a_set_without_names_is_left_out() -> None:
    class Saying(Letters):
        """Replies the same letter to every question, and notes the questions."""

        def __init__(self, token: int) -> None:
            self._token, self.asked = token, list[int]()

        async def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Rollout]:
            self.asked += [int(r.prompt_ids[0]) for r in requests]
            rollouts = await super().generate(requests, sampling)
            return [replace(rollout, completion_ids=np.asarray([self._token])) for rollout in rollouts]

    def routed(name: str, *routes: str) -> LoadedSet:
        settings = EvaluationSet(name=name, file="f", grader="exact", pass_at=(1,), pass_samples=2)
        asked = (Message(role="user", content="?"),)
        questions = [Record(f"q{i}", asked, None, None, None, "A", "f:1") for i in range(len(routes))]
        pairs = [PromptPair.of([i, 1], [i, 1], route=route) for i, route in enumerate(routes)]
        return LoadedSet(settings, questions, pairs)

    math, code = Saying(0), Saying(1)
    pools = {"math": cast(EnginePool, math), "code": cast(EnginePool, code)}
    sets, reasons = [routed("all", "math", "code", "math"), routed("some", "math", "")], list[str]()
    evaluator = Evaluator(Letters(), 60, lambda text: None)
    rows = asyncio.run(evaluator.teachers(pools, sets, 0, 0, external=True, skipped=reasons.append))
    assert [(row.label, row.value, row.n) for row in rows] == [
        ("all (teacher)", 2 / 3, 3),
        ("all pass@1 (teacher)", 2 / 3, 3),
    ]
    assert (math.asked, code.asked) == ([0, 2, 0, 0, 2, 2], [1, 1, 1])
    assert reasons == ["some (teacher) is not evaluated: 1 of its 2 rows have no column teacher"]


def test_pass_at_k_needs_as_many_replies_as_the_largest_k() -> None:
    with pytest.raises(ValueError, match="pass_samples 3 is less than the largest k of pass_at, 4; raise pass_samples"):
        EvaluationSet(name="s", file="f", grader="exact", pass_at=(1, 4), pass_samples=3)
    with pytest.raises(ValueError, match="give values of k from 1 to 128"):
        EvaluationSet(name="s", file="f", grader="exact", pass_at=(0,))
    assert EvaluationSet(name="s", file="f", grader="exact", pass_at=(1, 8)).sampled == 16
