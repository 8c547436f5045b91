"""The example of `make demo` trains: a real step of it, in bfloat16 as it is shipped.

The other examples differ by data and lengths alone: test_examples_data checks each of them as `sdft check` does.
"""

from pathlib import Path

from sdft.services.records.rows import read_jsonl
from tests.papers.readme import ROOT
from tests.runs.run import finish

EXAMPLES = ROOT / "examples"
# No evaluation here: its sets' files are read by the tests of the data, and 150 answers take a minute.
SHORT = ("training.steps=1", "evaluation.sets=[]")


def test_the_tool_example_trains(smollm2: Path, tmp_path: Path) -> None:
    """On its own model."""
    assert smollm2.is_dir()
    finish(EXAMPLES / "tools" / "tools.yaml", tmp_path / "run", *SHORT)
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["trained"] == 8
    # The teacher has been shown the call: on the student's first answers it is far from the student.
    assert 0.1 < row["divergence"] < 10
