"""The events and the figures of completions in status and report."""

from dataclasses import replace
from pathlib import Path

from sdft.services.analysis.report import write_report
from sdft.services.analysis.status import status_text
from sdft.services.monitoring.log import RunLog
from sdft.services.records.rows import Event
from tests.services.analysis.test_report import STEP as WITHOUT
from tests.services.analysis.test_report import begin
from tests.services.records.test_metrics import STEP

TOO_LONG = "the mean length of completions rose from 10 to 30 at step 9: a factor of 2 is allowed"


def write_events(run_dir: Path) -> None:
    log = RunLog(run_dir)
    for step in range(1, 13):
        log.step(replace(STEP, step=step))
    for step in (1, 2, 3, 4, 5, 6):
        log.event(Event(step, 0, "refreshed", "the teacher is the student of this step"))
    log.event(Event(8, 0, "fell", "general fell"))
    log.event(Event(9, 0, "drifted", TOO_LONG))
    log.event(Event(10, 0, "refused", TOO_LONG))
    log.close()


def test_status_tells_the_last_of_each_kind(tmp_path: Path) -> None:
    write_events(begin(tmp_path))
    lines = status_text(tmp_path).splitlines()
    at = lines.index(f"guard       2 times; the last time after step 9: {TOO_LONG}")
    assert lines[at + 1 : at + 3] == [
        "teacher     refreshed 6 times, after step ..., 2, 3, 4, 5, 6",
        f"            a refresh was refused once; the last time after step 10: {TOO_LONG}",
    ]


def test_the_report_lists_all_of_them(tmp_path: Path) -> None:
    write_events(begin(tmp_path))
    page = write_report(tmp_path).read_text()
    assert page.count("<td>the teacher was refreshed</td>") == 6
    assert f'<td>10</td><td>a refresh of the teacher was refused</td><td class="text">{TOO_LONG}</td>' in page


def test_a_resumed_run_forgets_the_events_after_its_checkpoint(tmp_path: Path) -> None:
    write_events(begin(tmp_path))
    RunLog.rewind(tmp_path, 8)
    assert "guard       once; the last time after step 8: general fell" in status_text(tmp_path)
    assert "refused" not in status_text(tmp_path)


def test_the_report_draws_the_figures_of_completions_that_a_run_has(tmp_path: Path) -> None:
    for name, step in (("with", replace(STEP, leaks=None)), ("without", WITHOUT)):
        log = RunLog(begin(tmp_path / name))
        log.step(step)
        log.step(replace(step, step=2, entropy=None))
        log.close()
    page = write_report(tmp_path / "with").read_text()
    for title in ("Length", "Length, tail", "Truncated", "Empty", "Repetition", "Distinct", "Entropy", "Reasoning"):
        assert f"<h3>{title}</h3>" in page
    assert "<h3>Leaks</h3>" not in page
    page = write_report(tmp_path / "without").read_text()
    assert "<h3>Gradient norm</h3>" in page
    assert "<h3>Entropy</h3>" not in page
