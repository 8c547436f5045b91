"""A pool of role `evaluation`: what it computes, and with which weights. In simulated time."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.types import Rollout, Sampling
from sdft.services.config.evaluation import EvaluationConfig
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sets import LoadedSet
from sdft.services.records.rows import read_jsonl
from simulation.cluster import Case, Learner, Student, drive, prepared
from tests.services.training.test_retention import GENERAL, Tokens

STEPS = 5


@pytest.mark.parametrize("staleness", [0, 2])
def test_it_evaluates_every_set_with_the_weights_of_the_step_and_nothing_else(tmp_path: Path, staleness: int) -> None:
    case = Case("third", engines=1, staleness=staleness, steps=STEPS)
    computed: dict[str, list[tuple[bool, int]]] = {"student": [], "evaluation": []}  # (greedy, weight version)

    def recorded(role: str) -> Any:
        class Recorded(Student):
            def generate(self, items: list[Any], argument: Sampling) -> tuple[float, list[Rollout]]:
                computed[role].append((argument.temperature == 0, self.version))
                return super().generate(items, argument)

        return lambda number: Recorded(number, case)

    one = prepared(case, 8)
    evaluation = EvaluationConfig.model_validate({"every": 2, "sets": [GENERAL]})
    question = Record("q", ({"role": "user", "content": "?"},), None, None, None, "right", "f:1")
    sets = [LoadedSet(s, [question], [PromptPair.of([1], None)]) for s in evaluation.sets]
    settings = one.config.model_copy(update={"evaluation": evaluation})
    one = replace(one, config=settings, common=sets, tokenizer=Tokens())
    with (tmp_path / "log").open("w") as said:
        drive(one, tmp_path, case, recorded("student"), Learner(0.1), said, evaluation=recorded("evaluation"))
    assert [row["step"] for row in read_jsonl(tmp_path / "eval.jsonl")] == [0, 2, 4, STEPS]
    assert computed["evaluation"] == [(True, 0), (True, 2), (True, 4), (True, STEPS)]
    assert not any(greedy for greedy, _ in computed["student"])
