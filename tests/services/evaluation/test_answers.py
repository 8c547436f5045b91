"""`sdft eval`: answers that are graded again, and pass@k of sampled ones."""

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
from sdft.services.config.sections import EvaluationSet
from sdft.services.data.contexts import PromptPair
from sdft.services.data.demonstrations import Message, Record
from sdft.services.data.sets import LoadedSet
from sdft.services.evaluation.answers import write_answers
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.fleet.pool import EnginePool
from sdft.services.records.rows import EvalResult, Sample

CONFIG = """
model: none
data: {train: train.jsonl}
training: {steps: 1}
evaluation: {sets: [{name: sums, file: sums.jsonl, grader: GRADER}]}
"""


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two answers that were graded by `exact`, of which one was right."""
    monkeypatch.chdir(tmp_path)
    rows = [{"id": "a", "prompt": "2 + 2?", "answer": "4"}, {"id": "b", "prompt": "3 + 3?", "answer": "6"}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        Sample(7, "sums", "a", "2 + 2?", "4", "4", True),
        Sample(7, "sums", "b", "3 + 3?", "6", "It is 6.", False),
    ]
    write_answers(tmp_path / "answers.jsonl", [EvalResult(7, 0, "sums", "accuracy", 0.5, 2)], samples)
    return tmp_path / "answers.jsonl"


def evaluate(grader: str, *more: str) -> int:
    Path("my.yaml").write_text(CONFIG.replace("GRADER", grader))
    return main(["eval", "my.yaml", "--regrade", "answers.jsonl", *more])


def test_answers_are_graded_again_by_another_grader(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("exact") == 0
    assert "50.0 %  n 2" in capsys.readouterr().out
    assert evaluate("exact, rows: 1") == 0  # of the answers there are, whatever is asked of the set today
    assert "50.0 %  n 2" in capsys.readouterr().out
    assert evaluate("numeric", "--out", "again.jsonl") == 0
    assert "100 %  n 2" in capsys.readouterr().out
    result, *samples = [json.loads(line) for line in Path("again.jsonl").read_text().splitlines()]
    assert result == {"step": 7, "stage": 0, "task": "sums", "metric": "accuracy", "value": 1.0, "n": 2}
    assert [sample["correct"] for sample in samples] == [True, True]


def test_answers_that_cannot_be_written_cost_no_results(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".again.jsonl.part").mkdir()
    assert evaluate("exact", "--out", "again.jsonl") == 3
    said = capsys.readouterr()
    assert "50.0 %  n 2" in said.out
    assert "--out again.jsonl: the answers could not be written ([Errno 21]" in said.err


def test_results_that_cannot_be_printed_cost_no_answers(
    answers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
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
        (lambda text: text.replace('"id": "b"', '"id": "z"'), "question z of sums, which its file does not have"),
        (lambda text: text + "{", "answers.jsonl:4: not JSON"),
        (lambda text: text + '{"id": 5}', "answers.jsonl:4: not an answer"),
        (lambda text: text.splitlines()[0], "there are no answers in it"),
        (
            lambda text: text + text.replace('"step": 7', '"step": 40'),
            "answers.jsonl: answers of several steps (7, 40); give a file with those of one",
        ),
    ],
)
def test_answers_to_other_questions_are_refused(
    answers: Path, capsys: pytest.CaptureFixture[str], spoil: object, words: str
) -> None:
    assert callable(spoil)
    answers.write_text(spoil(answers.read_text()))
    assert evaluate("exact") == 2
    assert words in capsys.readouterr().err


def test_what_cannot_be_together_is_said(answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("exact", "--model", "folder") == 2
    assert "--model has no part in it" in capsys.readouterr().err


class Letters:
    """A pool whose answer is a letter of its seed, a tokenizer that reads it: a third of the sampled answers are A."""

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
    loaded = LoadedSet(settings, questions, [PromptPair([1], None)] * 50)
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
        """Whoever is shown a demonstration, token 2, answers A every time."""

        async def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Rollout]:
            assert all(r.prompt_ids.tolist() == [2, 1] for r in requests)
            return await super().generate([replace(r, seed=0) for r in requests], replace(sampling, temperature=1.0))

    settings = EvaluationSet(name="letters", file="f", grader="exact", pass_at=(1, 4), pass_samples=8)
    question = Record("q", (Message(role="user", content="?"),), None, None, None, "A", "f:1")
    shown, alone = (LoadedSet(settings, [question], [PromptPair([1], ids)]) for ids in ([2, 1], None))
    said: list[str] = []
    rows = asyncio.run(
        Evaluator(Letters(), 60, said.append).teachers(cast(EnginePool, Leading()), [alone, shown], 0, 0)
    )
    assert [(row.label, row.value) for row in rows] == [
        ("letters (teacher)", 1.0),
        ("letters pass@1 (teacher)", 1.0),
        ("letters pass@4 (teacher)", 1.0),
    ]
    assert said == ["letters (teacher): 1 questions", "letters (teacher): 8 answers for pass@k"]


def test_pass_at_k_needs_as_many_answers_as_the_largest_k() -> None:
    with pytest.raises(ValueError, match="pass_samples 3 is less than the largest k of pass_at, 4; raise it"):
        EvaluationSet(name="s", file="f", grader="exact", pass_at=(1, 4), pass_samples=3)
    with pytest.raises(ValueError, match="give values of k from 1 to 128"):
        EvaluationSet(name="s", file="f", grader="exact", pass_at=(0,))
    assert EvaluationSet(name="s", file="f", grader="exact", pass_at=(1, 8)).sampled == 16
