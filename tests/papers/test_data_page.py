"""The rows that docs/data.md shows: each is checked, and the chat template shows student and teacher what it says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.cli.main import main
from tests.fakes.spoiling import Work, chat_template
from tests.fakes.tiny import WITH_TOOLS
from tests.papers.documents import ROOT, block, blocks, commands

PAGE = ROOT / "docs" / "data.md"
EXAMPLES = [text for text in blocks(PAGE) if text.startswith("{")]
LOGS = [text for text in EXAMPLES if "No, it is on a river." in text]  # rows of the method hindsight
OTHERS = [text for text in EXAMPLES if text not in LOGS]
FORMATS = {"conversations": "sharegpt", "instruction": "alpaca"}


def format_of(rows: str) -> str:
    return next((name for column, name in FORMATS.items() if f'"{column}"' in rows), "messages")


def test_all_kinds_of_rows_are_shown() -> None:
    rows: list[dict[str, Any]] = [json.loads(line) for text in EXAMPLES for line in text.splitlines()]
    assert {"prompt", "messages", "tools", "conversations", "instruction", "input", "history"} <= {
        column for row in rows for column in row
    }
    assert {format_of(text) for text in EXAMPLES} == {"messages", "sharegpt", "alpaca"}


@pytest.mark.usefixtures("unexamined")
@pytest.mark.parametrize("method", ["sdft", "sft"])
@pytest.mark.parametrize("rows", OTHERS, ids=range(len(OTHERS)))
def test_the_rows_of_the_page_are_read_and_shown(
    rows: str,
    method: str,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With the page's own settings and command."""
    work = Work(tmp_path, tiny_model)
    chat_template(WITH_TOOLS)(work)
    data = {"train": "my.jsonl"}
    if format_of(rows) != "messages":
        data = yaml.safe_load(block(f"data: {{train: {format_of(rows)}", PAGE))["data"]
    assert data.get("format", "messages") == format_of(rows)
    work.config |= {"data": data, "method": method, "sampling": {"max_new_tokens": 200}}
    work.write(data["train"], rows)
    work.save()
    monkeypatch.chdir(tmp_path)
    (command,) = (c for c in commands("sdft", PAGE) if "--show" in c)
    assert main(command[1:]) == 0
    said = capsys.readouterr().out
    assert said.count("student's context") == min(3, len(rows.splitlines()))
    assert "⟦" in said
    for line in rows.splitlines():
        if '"name": "weather"' in line:
            assert '"weather"' in said


@pytest.mark.usefixtures("unexamined")
def test_a_log_gives_two_records_and_a_row_with_feedback_one_of_them(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = []
    for rows, count in zip(LOGS, (2, 1), strict=True):
        work = Work(tmp_path, tiny_model)
        work.config |= {"data": {"train": "my.jsonl", "template": "feedback"}, "method": "hindsight"}
        work.write("my.jsonl", rows)
        work.save()
        assert main(["check", "my.yaml", "--show", "3"]) == 0
        said = capsys.readouterr().out
        assert said.count("student's context") == count
        first.append(said.partition("student's context")[2].partition("── reply")[0])
    assert first[0] == first[1]
