"""A real run whose student engine is split over two processes."""

from pathlib import Path

import pytest

from sdft.services.records.rows import read_jsonl
from tests.fakes.tiny import make_tiny_model
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import finish, write_run

pytestmark = pytest.mark.whole

STEPS = 3


def test_a_run_trains_on_the_samples_of_an_engine_that_is_split(tmp_path: Path) -> None:
    """The learner computes the same log-probs, with the weights of each step."""
    before = on_machine()
    config = write_run(tmp_path, make_tiny_model(tmp_path / "model", pairs=2), "float32", STEPS)
    finish(config, tmp_path / "run", "actors.student.tensor_parallel=2", "evaluation.sets=[]")
    rows = list(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    print([row["mismatch_kl"] for row in rows])
    assert max(abs(row["mismatch_kl"]) for row in rows) < 1e-7
    assert new_since(before) == set()
