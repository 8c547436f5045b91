"""The examples' own configurations train: a real step each, in bfloat16 as they are shipped."""

from pathlib import Path

from services.metrics import read_jsonl
from tests.readme import ROOT
from tests.runs import finish

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


def test_the_fact_example_trains(tiny_model: Path, tmp_path: Path) -> None:
    """On a tiny model, whose tokens are shorter: it is the configuration that is tried, and starts twice as fast."""
    limits = ("data.max_prompt_tokens=400", "data.max_teacher_prompt_tokens=800", f"model={tiny_model}")
    finish(EXAMPLES / "facts" / "facts.yaml", tmp_path / "run", *limits, *SHORT)
    (row,) = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["trained"] == 8
