"""`sdft check --show`: rows as the model will see them."""

import os
import re
from pathlib import Path

import pytest

from sdft.services.cli.main import main
from tests.fakes.spoiling import ROW, Work

pytestmark = pytest.mark.usefixtures("unexamined")
CODES = re.compile(r"\x1b\[[0-9;]*m")


def shown(work: Work, capsys: pytest.CaptureFixture[str], count: int = 1) -> str:
    """Return what is printed behind the plan."""
    work.save()
    assert main(["check", str(work.folder / "my.yaml"), "--show", str(count)]) == 0
    said = capsys.readouterr().out
    return said[re.search(r"\n(\x1b\[1m)?── (\S+: )?row 1 of", said).start() :].strip()  # type: ignore[union-attr]


@pytest.fixture
def work(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    return Work(tmp_path, tiny_model)


def test_sdft_shows_the_demonstration_in_place_of_a_rollout(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    work.set("sampling.max_new_tokens", 30)
    work.rows("train.jsonl", ROW, ROW | {"demonstration": "é"})
    lines = shown(work, capsys).splitlines()
    assert lines[0] == f"── row 1 of 2: {work.folder}/train.jsonl:1"
    assert re.fullmatch(r"── student's context, \d+ tokens:", lines[1])
    assert lines[2:5] == ["<|im_start|>user", "Say one.<|im_end|>", "<|im_start|>assistant"]
    assert any(re.fullmatch(r"── teacher's context, \d+ tokens:", line) for line in lines)
    assert lines.count("One it is.<|im_end|>") == 1  # the turn in the teacher's context
    *_, heading, reply = lines
    tokens, in_loss = map(int, re.findall(r"(\d+) tokens, (\d+) in the loss", heading)[0])
    assert tokens == in_loss + 3
    assert re.fullmatch(r"[^⟦]+⟦.*<\|im_end\|>⟧", reply)
    assert reply.replace("⟦", "").replace("⟧", "") == "One it is.<|im_end|>"


def test_sft_shows_exactly_the_loss_tokens(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    work.set("method", "sft")
    work.set("sampling.max_new_tokens", 30)
    said = shown(work, capsys, 5)
    assert said.count("⟦One it is.<|im_end|>⟧") == 2
    assert said.count("teacher's context: none") == 2
    counts = re.findall(r"(\d+) tokens, (\d+) in the loss", said)
    assert counts == [counts[0]] * 2
    assert counts[0][0] == counts[0][1]


def test_mix_shows_the_teachers_context_and_the_demonstration(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    work.set("method", "mix")
    work.set("sampling.max_new_tokens", 30)
    said = shown(work, capsys)
    assert re.search(r"── teacher's context, \d+ tokens:", said)
    assert "── reply (the demonstration in place of a sampled one)" in said


def test_a_reply_may_be_too_long_for_an_engine_or_have_no_token_in_the_loss(
    work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    work.set("sampling.max_new_tokens", 4)
    assert "a sampled reply is cut after 4 tokens, sampling.max_new_tokens\n" in shown(work, capsys)
    work.set("sampling.max_new_tokens", 30)
    work.rows("train.jsonl", ROW | {"demonstration": "I"})
    (work.folder / "my.yaml").unlink()
    *_, heading, reply = shown(work, capsys).splitlines()
    assert heading.endswith(", 2 tokens, 0 in the loss:")
    assert reply == "I<|im_end|>"


def test_a_row_without_demonstration_has_no_reply_yet(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    work.set("data.template", "none")
    work.rows("train.jsonl", {"prompt": "Say one."}, {"prompt": "Say two."})
    *_, teacher, reply = shown(work, capsys).splitlines()
    assert teacher == "── teacher's context: the same"
    assert reply == "── reply: sampled during the run; all but the first 3 tokens in the loss"


def test_each_stage_and_the_known_rows_of_a_log_are_shown(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    data = work.config.pop("data")
    log = {**data, "train": "log.jsonl", "source": "log"}
    work.rows("log.jsonl")
    work.set("training.steps", None)
    work.set("stages", [{"name": "a", "data": data, "steps": 1}, {"name": "b", "data": log, "steps": 1}])
    said = shown(work, capsys)
    assert "── a: row 1 of 2: " in said
    assert f"── b: {work.folder}/log.jsonl has no row yet" in said


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colour_is_on_a_terminal_and_not_with_no_color(
    work: Work, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_color: str, coloured: bool
) -> None:
    plain = shown(work, capsys)
    assert not CODES.search(plain)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    said = shown(work, capsys)
    assert ("\x1b[32m⟦" in said) == coloured
    assert bool(CODES.search(said)) == coloured
    assert CODES.sub("", said).strip() == plain


def test_spaces_are_kept_and_control_characters_are_visible(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 90 + "   "
    work.set("data.max_prompt_tokens", 300)
    work.set("data.max_teacher_prompt_tokens", 300)
    work.rows("train.jsonl", ROW | {"prompt": f"[bold]{long}\n\x1b[31mA\r"}, ROW)
    assert f"user\n[bold]{long}\n\\x1b[31mA\\r<|im_end|>\n" in shown(work, capsys)


def test_help_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as context:
        context.setitem(os.environ, "COLUMNS", "120")
        assert main(["check", "--help"]) == 0
    assert "--show" in capsys.readouterr().out
