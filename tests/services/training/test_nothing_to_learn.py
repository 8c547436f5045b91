"""Completions without a loss token: refused if none can have one, otherwise counted, and reported before and after."""

from pathlib import Path
from typing import Any

import pytest

from sdft.services.cli.main import main
from sdft.services.config.run import RunConfig
from sdft.services.records.rows import StepMetrics, read_rows
from simulation.cluster import Case, Learner, Student, drive, prepared
from tests.fakes.spoiling import ROW, Work

SHORT = {"prompt": "Say one.", "demonstration": "1"}


def config(method: str, stages: bool = False, **skips: int) -> RunConfig:
    own: dict[str, Any] = {"sampling": {"max_new_tokens": 3}, "method": {"type": method} | skips}
    whole: dict[str, Any] = {"model": "m", "training": {}}
    if stages:
        return RunConfig.model_validate(whole | {"stages": [own | {"name": "a", "data": {"train": "t"}, "steps": 1}]})
    return RunConfig.model_validate(whole | own | {"data": {"train": "t"}, "training": {"steps": 1}})


def test_a_configuration_by_which_nothing_can_be_learnt_is_refused() -> None:
    for method in ("sdft", "off_policy"):
        for stages, place in ((False, ""), (True, r"stages\[0\]\.")):
            words = (
                rf"{place}sampling\.max_new_tokens 3 must be more than {place}method\.skip_first 3, or no token is in"
            )
            with pytest.raises(ValueError, match=words):
                config(method, stages)
            assert config(method, stages, skip_first=2).tasks[0].method.skipped == 2
    assert config("sft").method.type == "sft"  # SFT learns whole demonstrations


@pytest.mark.parametrize(
    ("rows", "settings", "warns"),
    [
        ([SHORT] * 3, {}, "3 of 3 demonstrations"),
        ([SHORT] * 2 + [ROW], {}, "2 of 3 demonstrations"),
        ([SHORT, ROW], {}, None),
        ([SHORT] * 3, {"method.skip_first": 1}, None),
        ([SHORT] * 3, {"method": "sft"}, None),
    ],
)
def test_check_warns_of_demonstrations_that_are_too_short(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, str]],
    settings: dict[str, Any],
    warns: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    work = Work(tmp_path, tiny_model)
    work.rows("train.jsonl", *rows)
    for key, value in settings.items():
        work.set(key, value)
    work.save()
    assert main(["check", "my.yaml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(lines) == (warns is not None)
    assert warns is None or (warns in lines[0] and "lower method.skip_first" in lines[0])


def test_the_loss_tokens_of_a_step_are_recorded(tmp_path: Path) -> None:
    case = Case("counted", engines=1, staleness=0, steps=2)
    with (tmp_path / "log").open("w") as said:
        drive(prepared(case, 4), tmp_path, case, lambda number: Student(number, case), Learner(0.1), said)
    steps = read_rows(tmp_path, StepMetrics)
    assert [m.loss_tokens for m in steps] == [m.completion_tokens for m in steps]  # this learner counts all of them
    assert f"{steps[0].loss_tokens} loss tokens" in (tmp_path / "log").read_text()
