"""The example of `make demo` trains: one real step in bfloat16, as shipped.

The other examples differ only in data and lengths: test_examples_data checks each of them as `sdft check` does.
"""

from pathlib import Path

import pytest

from sdft.services.records.rows import read_jsonl
from tests.papers.documents import ROOT
from tests.runs.run import finish

EXAMPLES = ROOT / "examples"
# No evaluation: 150 replies take a minute, and the tests of the data read the files of the sets.
SHORT = ("training.steps=1", "evaluation.sets=[]")


@pytest.mark.whole
def test_the_tool_example_trains(smollm2: Path, tmp_path: Path) -> None:
    """With the model of the example."""
    assert smollm2.is_dir()
    finish(EXAMPLES / "tools" / "tools.yaml", tmp_path / "run", *SHORT)
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["trained"] == 8
    # The teacher's prompt has the demonstration: the teacher is far from the student on the first rollouts.
    assert 0.1 < row["divergence"] < 10
