import io
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from sdft.services.base.errors import UserError
from sdft.services.config.sections import MonitoringConfig
from sdft.services.config.sinks import check_sinks
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.monitoring.sinks import MLflow, Sinks, TensorBoard, WeightsAndBiases
from sdft.services.records.rows import (
    DETERMINISTIC_FIELDS,
    EvalResult,
    Reply,
    StepMetrics,
    read_jsonl,
    read_rows,
    without_loss_tokens,
)
from sdft.services.records.text import percent

FILES_ONLY = MonitoringConfig(tensorboard=False)
STEP = StepMetrics(
    step=1,
    stage=0,
    loss=0.5,
    divergence=0.25,
    direction="forward",
    grad_norm=1.5,
    lr=1e-5,
    samples=8,
    prompt_tokens=800,
    completion_tokens=240,
    student_version=1,
    teacher_version=1,
    staleness_mean=0.0,
    staleness_max=0,
    mismatch_kl=1e-4,
    tail_mass=0.01,
    time_rollout_s=2.0,
    time_score_s=1.0,
    time_learn_s=4.0,
    time_sync_s=1.0,
    time_wait_s=0.5,
    time_step_s=8.5,
    tokens_per_s=28.2,
    trained=8,
    dropped=0,
    in_flight=0,
    loss_tokens=216,
    length_mean=30.0,
    length_tail=41.0,
    truncated=0.125,
    empty=0.0,
    repeated=0.05,
    distinct=0.75,
    entropy=0.5,
    leaks=0.0,
    thoughts=0.25,
    clipped=0.25,
    loss_entropy=1.25,
)


def reply(step: int) -> Reply:
    return Reply(step, "tools", "q1", "Was ist 2×3?", {"name": "add", "n": None}, "6 ☃", True)


def write_run(run_dir: Path, steps: int) -> None:
    log = RunLog(run_dir)
    for step in range(1, steps + 1):
        log.step(replace(STEP, step=step, trained=8 * step))
        log.evaluation(EvalResult(step, 0, "tools", "accuracy", step / 10, 10))
        log.reply(reply(step))
    log.close()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    assert read_rows(tmp_path, StepMetrics)[2] == replace(STEP, step=3, trained=24)
    assert read_rows(tmp_path, EvalResult)[0] == EvalResult(1, 0, "tools", "accuracy", 0.1, 10)
    assert read_rows(tmp_path, Reply)[1] == reply(2)


def test_a_line_is_on_disk_before_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    log = RunLog(tmp_path)
    log.step(STEP)
    assert synced == [str(tmp_path / "metrics.jsonl")]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == asdict(STEP)
    log.close()


def test_a_number_that_is_not_finite_is_valid_json_and_nan_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.step(replace(STEP, loss=math.nan, grad_norm=math.inf))
    log.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["loss"] is None
    assert line["grad_norm"] is None
    assert math.isnan(read_rows(tmp_path, StepMetrics)[0].loss)


def test_steps_of_a_version_that_counted_no_loss_tokens_are_read(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    old = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert old.pop("loss_tokens") == 216
    (tmp_path / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    steps = read_rows(tmp_path, StepMetrics)
    assert steps == [replace(STEP, trained=8, loss_tokens=None)]
    assert without_loss_tokens(steps) is None


def test_deterministic_fields_leave_out_only_what_a_clock_measures() -> None:
    clock = {"time_rollout_s", "time_score_s", "time_learn_s", "time_sync_s", "time_wait_s", "time_step_s"}
    assert set(asdict(STEP)) - set(DETERMINISTIC_FIELDS) == clock | {"tokens_per_s"}


def test_rewind_drops_what_came_after_the_checkpoint_and_the_half_written_line(tmp_path: Path) -> None:
    write_run(tmp_path, 5)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"step": 6, "text": "\xe2\x98')
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    RunLog.rewind(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == before[:3]
    assert [row["step"] for row in read_jsonl(tmp_path / "eval.jsonl")] == [1, 2, 3]
    assert [row["step"] for row in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
    log = RunLog(tmp_path)
    log.step(replace(STEP, step=4))
    log.close()
    assert [m.step for m in read_rows(tmp_path, StepMetrics)] == [1, 2, 3, 4]
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("step", [None, -1])
def test_rewind_to_before_the_first_step_drops_everything(tmp_path: Path, step: int | None) -> None:
    write_run(tmp_path, 2)
    RunLog.rewind(tmp_path, step)
    assert [read_jsonl(tmp_path / f"{name}.jsonl") for name in ("metrics", "eval", "samples")] == [[], [], []]


def test_rewind_of_a_folder_without_files_does_nothing(tmp_path: Path) -> None:
    RunLog.rewind(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_a_whole_last_line_without_its_line_end_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    RunLog.rewind(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("bad", ['{"step": 2', "[1]", '"half"'])
def test_a_bad_line_that_is_not_the_last_is_named(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not "):
        read_jsonl(path)


def test_a_field_that_another_version_did_not_write_is_named(tmp_path: Path) -> None:
    (tmp_path / "eval.jsonl").write_text('{"step": 1, "stage": 0, "task": "t", "metric": "accuracy", "value": 1}\n')
    with pytest.raises(UserError, match=r"eval\.jsonl: a line of step 1 has no 'n'"):
        read_rows(tmp_path, EvalResult)


def test_the_interval_is_wilsons() -> None:
    low, high = EvalResult(0, 0, "t", "accuracy", 0.8125, 80).interval
    assert (low, high) == pytest.approx(
        (0.71344, 0.88288), abs=1e-4
    )  # scipy: binomtest(65, 80).proportion_ci(method="wilson")
    assert EvalResult(0, 0, "t", "accuracy", 0.0, 80).interval == pytest.approx((0.0, 0.04582), abs=1e-4)
    assert EvalResult(0, 0, "t", "accuracy", math.nan, 0).interval == (0.0, 1.0)


def test_percent_reads_as_people_write() -> None:
    assert [percent(v) for v in (0.0, 0.8125, 0.9999, 1.0, math.nan)] == ["0.0 %", "81.3 %", "100.0 %", "100 %", "–"]


def test_tensorboard_shows_the_curves_and_forgets_the_steps_that_were_rewound(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Sinks(tmp_path, MonitoringConfig(), print) as sinks:
        log = RunLog(tmp_path, sinks)
        for step, loss in ((1, 0.5), (2, 0.25), (3, 9.0)):
            log.step(replace(STEP, step=step, loss=loss))
        log.evaluation(EvalResult(3, 0, "tools", "accuracy", 0.75, 80))
        log.close()
        RunLog.rewind(tmp_path, 2)
        log = RunLog(tmp_path, sinks)
        log.step(replace(STEP, step=3, loss=0.125))
        log.evaluation(EvalResult(3, 0, "tools", "accuracy", 0.5, 80))
        log.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("eval/tools/accuracy")] == [(3, 0.5)]
    assert events.Scalars("time/rollout_s")[0].value == 2.0


@pytest.mark.parametrize(
    ("package", "key"), [("wandb", "wandb_project"), ("mlflow", "mlflow_experiment"), ("tensorboard", "tensorboard")]
)
def test_a_sink_that_is_not_installed_is_named_before_the_run(
    package: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark of a module that cannot be imported
    values = {"tensorboard": False, key: True if key == "tensorboard" else "demo"}
    with pytest.raises(UserError, match=rf"monitoring\.{key} is set.*run `pip install {package}`"):
        check_sinks(MonitoringConfig.model_validate(values))
    check_sinks(FILES_ONLY)


class Logged:
    """Replaces a sink's package or its run, and records the calls with their arguments."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __getattr__(self, name: str) -> Callable[..., "Logged"]:
        def call(*arguments: Any, **named: Any) -> Logged:
            self.calls[name] = (arguments, named)
            return self

        return call


def test_mlflow_gets_names_that_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow refuses an @."""
    monkeypatch.setitem(sys.modules, "mlflow", mlflow := Logged())
    MLflow(tmp_path, "demo").log(3, {"eval/tools/pass@8": 0.5, "train/loss": 1.0})
    (metrics,), named = mlflow.calls["log_metrics"]
    assert metrics == {"eval/tools/pass_at_8": 0.5, "train/loss": 1.0}
    assert named["step"] == 3


def test_wandb_gets_the_configuration_as_the_run_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb := Logged())
    (tmp_path / "config.yaml").write_text("stages:\n- name: 2026-11-27\n  optimizer: {lr: 1e-5}\n")
    WeightsAndBiases(tmp_path, "demo")
    config = {"stages": [{"name": "2026-11-27", "optimizer": {"lr": 1e-5}}]}
    assert wandb.calls["init"][1]["config"] == config


def test_wandb_gets_each_step_once_also_when_a_learner_repeats_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B accepts steps only in increasing order. One W&B run begins, however often the log is opened."""
    begun: list[dict[str, Any]] = []
    sent: list[int] = []

    class Run(ModuleType):
        def init(self, **settings: Any) -> "Run":
            begun.append(settings)
            return self

        def log(self, metrics: dict[str, float], step: int) -> None:
            sent.append(step)

        def finish(self) -> None:
            sent.append(-1)

    monkeypatch.setitem(sys.modules, "wandb", Run("wandb"))
    with Sinks(tmp_path, MonitoringConfig(tensorboard=False, wandb_project="demo"), print) as sinks:
        for first, last in ((1, 4), (3, 6)):  # the learner is lost after step 4, and step 2 has a checkpoint
            RunLog.rewind(tmp_path, first - 1)
            log = RunLog(tmp_path, sinks)
            for step in range(first, last + 1):
                log.step(replace(STEP, step=step))
            log.evaluation(EvalResult(last, 0, "tools", "accuracy", 0.5, 80))
            log.close()
    assert len(begun) == 1
    assert sent == [1, 2, 3, 4, 4, 4, 5, 6, 6, -1]


@pytest.mark.parametrize("where", ["open", "go_on", "log", "close"])
def test_a_sink_that_fails_is_reported_once_and_the_run_goes_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the server said 500\nand more")

    monkeypatch.setattr(TensorBoard, "__init__" if where == "open" else where, fail)
    notices: list[str] = []
    with Sinks(tmp_path, MonitoringConfig(), notices.append) as sinks:
        log = RunLog(tmp_path, sinks)
        for step in (1, 2, 3):
            log.step(replace(STEP, step=step))
        log.close()
    assert [m.step for m in read_rows(tmp_path, StepMetrics)] == [1, 2, 3]
    assert notices == [
        "TensorBoard failed (ValueError: the server said 500) and is switched off until the run restarts; "
        "metrics.jsonl has all metrics"
    ]


def test_a_folder_named_wandb_is_not_taken_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="pip install wandb"):
        check_sinks(MonitoringConfig(tensorboard=False, wandb_project="demo"))


RESULTS = [EvalResult(0, 0, "tools", "accuracy", 0.0, 80), EvalResult(0, 0, "tools", "teacher_accuracy", 0.9, 80)]


def test_a_log_gets_one_plain_whole_line_a_step_however_narrow_it_is() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, width=20), total_steps=41, title="demo") as progress:
        progress.phase("starting engines")
        progress.evaluation(RESULTS)
        progress.step(replace(STEP, time_step_s=8.51))
        progress.note("[checkpoint] saved")
    assert out.getvalue().splitlines() == [
        "starting engines",
        "evaluation at step 0  tools 0.0 % (n 80)  tools (teacher) 90.0 % (n 80)",
        "step 1/41  loss 0.5000  forward KL 0.2500  216 loss tokens  28 tok/s  "
        "rollout 2.0s score 1.0s learn 4.0s sync 1.0s wait 0.5s  ETA 5:40",
        "[checkpoint] saved",
    ]


def test_a_terminal_gets_a_panel_with_the_last_step_and_the_evaluations() -> None:
    out = io.StringIO()
    console = Console(file=out, width=90, height=30, force_terminal=True, color_system=None, _environ={})
    with Progress(console, total_steps=40, title="demo") as progress:
        progress.evaluation([*RESULTS, EvalResult(0, 0, "tools", "pass@8", 0.3, 80)])  # no column of its own
        progress.step(replace(STEP, direction="jsd"))
        for step in range(10, 130, 10):
            progress.evaluation([EvalResult(step, 0, "tools", "accuracy", step / 200, 80)])
        progress.phase("evaluating at step 130")
        progress.part("tools: 80 questions")
        progress.note("a note")
    assert "a note" in out.getvalue()
    panel = out.getvalue().rpartition("sdft · demo")[2]
    assert "step 1/40" in panel
    assert "evaluating at step 130, tools: 80 questions" in out.getvalue()
    assert "JSD 0.2500" in panel
    assert "learn 4.0" in panel
    rows = [line.strip("│ ").split() for line in panel.splitlines()]
    assert ["teacher", "90.0", "%"] in rows
    assert ["step", "0", "0.0", "%"] in rows
    assert ["…", "5", "more"] in rows
    assert ["step", "120", "60.0", "%"] in rows
    assert ["step", "20", "10.0", "%"] not in rows
