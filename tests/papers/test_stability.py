"""examples/stability: its configuration and variants are taken; what a run shows is found as the table says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from examples.stability.sweep import CONFIG, VARIANTS, fall_of, found_in, table
from sdft.services.cli.main import main
from sdft.services.config.load import load_config
from sdft.services.records.rows import STUDENT_ACCURACY, EvalResult, StepMetrics
from tests.services.records.test_metrics import STEP


def result(step: int, value: float, task: str = "tools") -> EvalResult:
    return EvalResult(step=step, task=task, metric=STUDENT_ACCURACY, value=value, n=100, stage=0)


def row(step: int, length: float) -> StepMetrics:
    return replace(STEP, step=step, stage=0, length_mean=length)


def test_the_configuration_is_good(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2.is_dir()
    assert main(["check", str(CONFIG)]) == 0
    assert "400 steps of 8 prompts" in capsys.readouterr().out


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_configuration(name: str) -> None:
    settings = VARIANTS[name].settings
    config = load_config(CONFIG, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    assert config.training.steps == 400


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0.0, 0.5, 0.8], None),
        ([0.0, 0.8, 0.75, 0.6, 0.2], 60),
        ([0.0, 0.8, 0.6, 0.8], None),  # it has come back
        ([0.8, 0.6, 0.9, 0.5, 0.4], 60),
        ([0.8], None),
    ],
)
def test_a_set_falls_at_the_first_step_from_which_it_stays_below_its_best(
    values: list[float], step: int | None
) -> None:
    assert fall_of([result(20 * i, value) for i, value in enumerate(values)]) == step


def test_a_run_is_found_as_the_table_says() -> None:
    results = [result(20 * i, value) for i, value in enumerate([0.0, 0.8, 0.8, 0.3])]
    results += [result(20 * i, 1.0, "general") for i in range(4)]
    steps = [row(step, 20.0 if step <= 30 else 60.0) for step in range(1, 61)]
    found = found_in(results, steps)
    assert found.fell == (60, "tools")
    assert found.first is not None
    assert found.first[1] == "length"
    assert 30 < found.first[0] < 45
    last = table({"live": [found]}).splitlines()[-1]
    step = found.first[0]
    assert last == (f"| live | 0 | 30.0 (80.0) | 100.0 (100.0) | 60 (tools) | length at {step} | {60 - step} |")
