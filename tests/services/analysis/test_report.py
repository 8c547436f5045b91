import fcntl
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from sdft.services.analysis.report import write_report
from sdft.services.analysis.status import status_text
from sdft.services.analysis.svg import lines
from sdft.services.base.errors import UserError
from sdft.services.cli.train import _only_one
from sdft.services.monitoring.log import RunLog
from sdft.services.records.rows import EvalResult, Reply, StepMetrics
from sdft.services.records.run_dir import LOCK

STEP = StepMetrics(
    step=1, stage=0, loss=0.5, divergence=0.25, direction="reverse", grad_norm=1.5, lr=1e-5, samples=8,
    prompt_tokens=800, completion_tokens=240, student_version=1, teacher_version=1, staleness_mean=0.0, staleness_max=0,
    mismatch_kl=1e-4, tail_mass=0.01, time_rollout_s=2.0, time_score_s=1.0, time_learn_s=4.0, time_sync_s=1.0,
    time_wait_s=0.5, time_step_s=8.5, tokens_per_s=28.2, trained=8, dropped=0, in_flight=0,
)  # fmt: skip
SETS = [
    {"name": "tools", "role": "task"},
    {"name": "general", "role": "retention"},
    {"name": "prose", "role": "retention", "grader": "perplexity"},
]


@contextmanager
def training(run_dir: Path) -> Iterator[None]:
    """Hold the run's lock, as a process that trains does."""
    with (run_dir / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def begin(run_dir: Path, sets: list[dict[str, str]] | None = None, **run: object) -> Path:
    """Write a run directory as it is before the first step."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "evaluation": {"sets": sets or []}}))
    state = {"pid": os.getpid(), "host": socket.gethostname(), "state": "running", "error": None, "total_steps": 4}
    (run_dir / "run.json").write_text(json.dumps(state | run))
    return run_dir


def train(run_dir: Path, steps: int, prompt: str = "2 + 2?") -> None:
    """Write steps and evaluations: tools goes from 0 of 80 to 65, general from 80 to 79."""
    log = RunLog(run_dir)
    log.evaluation(EvalResult(0, 0, "tools", "teacher_accuracy", 0.9, 80))
    for step in range(steps + 1):
        if step:
            log.step(replace(STEP, step=step, trained=8 * step, loss=0.5 / step))
        if step in (0, steps):
            log.evaluation(EvalResult(step, 0, "tools", "accuracy", 0.8125 if step else 0.0, 80))
            log.evaluation(EvalResult(step, 0, "general", "accuracy", 0.9875 if step else 1.0, 80))
            log.evaluation(EvalResult(step, 0, "prose", "perplexity", 21.0 if step else 20.0, 900))
            log.reply(Reply(step, "tools", "q<1>", prompt, {"n": 4}, f"<b>{step}</b>", step > 0))
    log.close()


class Page(HTMLParser):
    """Checks that tags close in order, and collects links, ids and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data"):
                self.links.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_of_a_finished_run_tells_the_result_and_its_uncertainty(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS, state="finished"), 4)
    page = Page(write_report(tmp_path))
    assert "tools: 0.0 % → 81.3 % (n 80); retention general: 100 % → 98.8 % (n 80)" in page.text
    assert "retention prose: perplexity 20.00 → 21.00 (n 900)" in page.text
    assert "Finished at step 4 of 4" in page.text

    def cells(name: str) -> list[str]:
        row = re.search(rf"<tr><td>{name}.*?</tr>", page.source, re.DOTALL)
        assert row is not None
        return [" ".join(re.sub("<[^>]+>", " ", c).split()) for c in re.findall(r"<td>(.*?)</td>", row[0], re.DOTALL)]

    assert cells("tools") == [
        "tools",
        "task",
        "0.0 % 0.0 – 4.6",
        "81.3 % 71.3 – 88.3",
        "+81.3",
        "90.0 % 81.5 – 94.8",
        "80",
    ]
    prose = ["prose", "retention", "perplexity 20.00", "perplexity 21.00", "+5.0 %", "–", "900"]
    assert cells("prose") == prose
    assert "32 samples trained, 0 dropped, 0 in flight after step 4." in page.text
    assert "Loss and divergence (reverse KL)" in page.text
    assert page.source.count("<svg") == 8
    assert "model: tiny" in page.text


def test_a_streams_stage_is_in_its_status_and_its_tasks_are_in_a_heat_map(tmp_path: Path) -> None:
    run_dir = begin(tmp_path, SETS[1:], stages=[["tools", 4], ["facts", 9]], total_steps=9)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["stages"] = [{"name": "tools", "sets": SETS[:1]}, {"name": "facts", "sets": []}]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    train(run_dir, 3)
    assert re.search(r"^stage +1 of 2, tools: steps 1 to 4$", status_text(run_dir), re.MULTILINE)
    train(run_dir, 4)
    assert re.search(r"^stage +2 of 2, facts: steps 5 to 9$", status_text(run_dir), re.MULTILINE)
    page = Page(write_report(run_dir))
    assert "Tasks across stages" in page.text
    assert "Bold: right after the task's own stage. average accuracy 81.3 %" in page.text
    heat_map = page.source.partition("Accuracy of every task after each stage")[2].partition("</svg>")[0]
    for text in ("before", "after tools", "tools", "general (retention)", "81.3 %", "98.8 %"):
        assert f"{text}<" in heat_map, text
    assert "after facts" not in heat_map


@pytest.mark.parametrize(
    ("method", "direction", "note"),
    [
        (
            "sdft",
            "jsd",
            "The JSD of teacher and student on the student's tokens; the loss adds the importance weights and "
            "the options of method.",
        ),
        (
            "off_policy",
            "forward",
            "The forward KL of teacher and student on the teacher's tokens; the loss adds only the options",
        ),
        ("sft", "nll", "The NLL of the demonstrations' tokens, which is also the loss."),
        ("dft", "dft", "The NLL of the demonstrations' tokens; the loss weighs each by the student's probability"),
    ],
)
def test_the_note_on_the_loss_is_that_of_the_method(tmp_path: Path, method: str, direction: str, note: str) -> None:
    run_dir = begin(tmp_path)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "method": method}))
    log = RunLog(run_dir)
    log.step(replace(STEP, direction=direction))
    log.close()
    assert note in Page(write_report(run_dir)).text


def test_the_report_of_a_stream_names_all_losses(tmp_path: Path) -> None:
    run_dir = begin(tmp_path, [], stages=[["a", 1], ["b", 2]])
    stages = [{"name": "a", "sets": [], "method": "sft"}, {"name": "b", "sets": [], "method": None}]
    config = {"model": "tiny", "evaluation": {"sets": []}, "stages": stages}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    log = RunLog(run_dir)
    log.step(replace(STEP, direction="nll"))
    log.step(replace(STEP, step=2, stage=1, direction="sampled", loss=-0.5))
    log.close()
    text = Page(write_report(run_dir)).text
    assert "Loss and divergence (NLL, sampled-token KL)" in text
    assert "sft: The NLL of the demonstrations' tokens, which is also the loss. sdft: The sampled-token KL of" in text


def test_values_below_zero_are_drawn() -> None:
    """The estimate of a divergence from one token per position may be negative."""
    from matplotlib.figure import Figure

    for values, limits in (((0.5, -0.25), (-0.27, 0.54)), ((-0.5, -0.25), (-0.54, 0)), ((0.5, 0.0), (0, 0.54))):
        axes = Figure().add_subplot()
        rows = [replace(STEP, step=i, loss=value) for i, value in enumerate(values, 1)]
        lines(axes, rows, [("loss", lambda m: m.loss, "black")])
        assert axes.get_ylim() == pytest.approx(limits)


def test_pass_at_k_is_drawn_before_training_and_last_with_the_teachers(tmp_path: Path) -> None:
    run_dir = begin(tmp_path / "run", SETS)
    train(run_dir, 3)
    log = RunLog(run_dir)
    for step, metric, share in ((0, "pass@", 0.01), (0, "teacher_pass@", 0.1), (3, "pass@", 0.05)):
        for k in (1, 4, 16):
            log.evaluation(EvalResult(step, 0, "tools", f"{metric}{k}", k * share / 2, 80))
    log.close()
    page = Page(write_report(run_dir))
    assert page.source.count('aria-label="pass@k of tools"') == 1
    chart = page.source.partition('aria-label="pass@k of tools"')[2].partition("</svg>")[0]
    assert all(f">{label}<" in chart for label in ("step 0", "step 3", "teacher", "1", "4", "16"))


def test_the_report_needs_nothing_beside_itself(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS), 3)
    page = Page(write_report(tmp_path))
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert set(re.findall(r"https?://[^\"'\s)]+", page.source)) <= {
        "http://www.w3.org/2000/svg",  # names of XML name spaces, never fetched
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"@import|<script|<link|url\((?!#)", page.source)


def test_answers_stand_side_by_side_escaped_and_marked_in_words(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS), 3, prompt="<script>alert(1)</script>" + "long & winding " * 500 + "the question?")
    page = Page(write_report(tmp_path))
    assert "<script>" not in page.source
    assert "<b>0</b>" not in page.source
    assert "<b>3</b>" in page.text
    assert page.text.index("Before, step 0: ✗ wrong") < page.text.index("After, step 3: ✓ right")
    summary = re.search(r"<summary>(.*?)<span", page.source)
    assert summary is not None
    assert summary[1].endswith("the question? ")
    assert len(summary[1]) < 250
    assert '{"n": 4}' in page.text


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_only_begun_has_a_report(tmp_path: Path, steps: int) -> None:
    train(begin(tmp_path, SETS), steps)
    page = Page(write_report(tmp_path))
    assert f"at step {steps} of 4" in page.text
    assert ("Before training: tools: 0.0 % (n 80)" in page.text) == (steps == 0)


def test_a_run_without_metrics_or_sets_has_a_report(tmp_path: Path) -> None:
    page = Page(write_report(begin(tmp_path, state="failed", error="rank 0: <out of memory>")))
    assert "The run ended before its first step" in page.text
    assert "rank 0: <out of memory>" in page.text
    assert "No step and no evaluation yet." in page.text


def test_a_run_without_evaluation_sets_tells_its_loss(tmp_path: Path) -> None:
    log = RunLog(begin(tmp_path))
    log.step(STEP)
    log.step(replace(STEP, step=2, loss=float("nan")))
    log.step(replace(STEP, step=3, loss=0.125))
    log.close()
    page = Page(write_report(tmp_path))
    assert "Loss 0.5000 → 0.1250 in 3 steps; the configuration names no evaluation sets" in page.text


def test_a_set_the_configuration_does_not_name_is_reported_too(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS[:1]), 2)
    page = Page(write_report(tmp_path))
    assert "general: 100 % → 98.8 % (n 80)" in page.text


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS), 2)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_status_says_how_far_a_running_run_is(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS), 2)
    for name, step in (("step-000001", 1), ("step-000002", 2), ("step-000003.part", 3)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "manifest.json").write_text(json.dumps({"step": step}))
    (tmp_path / "checkpoints" / "step-000004").mkdir()  # no manifest: not a whole checkpoint
    ledger = sqlite3.connect(tmp_path / "ledger.sqlite")
    ledger.execute("CREATE TABLE samples (id TEXT, state TEXT, tokens INTEGER)")
    rows = [
        ("a", "trained", 7),
        ("b", "trained", 30),
        ("c", "issued", None),
        ("d", "dropped", 99),
        ("e", "dropped", None),
    ]
    ledger.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows)
    ledger.commit()
    ledger.close()
    assert (
        "Trained: 7 to 30 tokens, median 30; dropped: 99 to 99 tokens, median 99." in Page(write_report(tmp_path)).text
    )
    with training(tmp_path):
        lines = status_text(tmp_path).splitlines()
    assert lines[1] == f"state       running (pid {os.getpid()})"
    assert re.fullmatch(r"step        2 of 4, \d+ s ago", lines[2])
    assert lines[3:] == [
        "loss        0.5000, 0.2500  (reverse KL 0.2500, 28 tok/s)",
        "evaluation  tools (task): 0.0 % → 81.3 % (n 80) at step 2; teacher 90.0 %",
        "            general (retention): 100 % → 98.8 % (n 80) at step 2",
        "            prose (retention): perplexity 20.00 → 21.00 (n 900) at step 2",
        "samples     1 issued, 2 trained, 2 dropped",
        "            trained: 7 to 30 tokens, median 30",
        "            dropped: 99 to 99 tokens, median 99",
        f"checkpoint  {tmp_path}/checkpoints/step-000002",
        f"next        curves so far: sdft report {tmp_path}",
    ]


def test_status_and_report_say_what_bounds_the_run(tmp_path: Path) -> None:
    train(begin(tmp_path, SETS), 4)
    sentence = "the learner's step, 47.1 % of a step; use more learner ranks (learner.ranks)"
    (line,) = [line for line in status_text(tmp_path).splitlines() if line.startswith("bound by")]
    assert sentence in line
    assert f"Bound by {sentence}" in Page(write_report(tmp_path)).text
    config = yaml.safe_load((tmp_path / "config.yaml").read_text()) | {"training": {"max_staleness": 1}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert "while the engines keep ahead" in status_text(tmp_path)
    assert "Sampling and scoring overlap with the learner's steps" in Page(write_report(tmp_path)).text


def test_a_report_without_a_home_prints_its_path_alone_and_leaves_nothing(tmp_path: Path) -> None:
    train(begin(tmp_path / "run"), 2)
    (tmp_path / "home").write_text("")  # no folder can be made below it, not even by root
    (tmp_path / "temporary").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "MPL"))}
    result = subprocess.run(
        [sys.executable, "-m", "sdft.services.cli", "report", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=kept | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")},
    )
    assert (result.stdout, result.stderr) == (f"{tmp_path / 'run' / 'report.html'}\n", "")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_status_tells_a_killed_run_from_a_running_one(tmp_path: Path) -> None:
    """The lock decides. The process number may belong to another process by then, such as this one."""
    text = status_text(begin(tmp_path))
    assert "state       stopped (killed)\n" in text
    assert text.endswith(f"start again with: sdft train {tmp_path / 'config.yaml'} --run-dir {tmp_path}")
    with training(tmp_path):
        assert "state       running (pid 1)\n" in status_text(begin(tmp_path, pid=1))
    assert "state       stopped (killed)\n" in status_text(tmp_path)


def test_the_state_of_a_run_on_another_host_comes_from_its_lock(tmp_path: Path) -> None:
    begin(tmp_path, pid=1, host="another")
    assert "state       running (pid 1 on another; not seen from this host)\n" in status_text(tmp_path)
    with training(tmp_path):
        assert "state       running (pid 1 on another)\n" in status_text(tmp_path)


def test_a_run_can_start_while_its_status_is_read(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        looked = threading.Timer(0.15, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        looked.start()
        with _only_one(tmp_path):
            assert "running" in status_text(begin(tmp_path))
        looked.join()


def test_status_of_a_failed_run_gives_the_error_and_how_to_resume(tmp_path: Path) -> None:
    begin(tmp_path, state="failed", error="rank 0 died")
    (tmp_path / "checkpoints" / "step-000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-000010" / "manifest.json").write_text("{}")
    text = status_text(tmp_path)
    assert "error       rank 0 died" in text
    assert text.endswith(f"next        resume with: sdft train {tmp_path / 'config.yaml'} --run-dir {tmp_path}")


def test_a_ledger_that_has_only_been_created_counts_nothing(tmp_path: Path) -> None:
    sqlite3.connect(begin(tmp_path) / "ledger.sqlite").close()
    assert "samples" not in status_text(tmp_path)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((0, 0), "nothing was learnt: no completion was longer than method.skip_first"),
        ((0, 7), "1 of 2 steps had no token in the loss"),
        ((5, 7), None),
        ((None, None), None),
    ],
)
def test_a_run_that_learnt_nothing_says_so(tmp_path: Path, counts: tuple[int | None, ...], words: str | None) -> None:
    begin(tmp_path)
    log = RunLog(tmp_path)
    for step, count in enumerate(counts, 1):
        log.step(replace(STEP, step=step, loss_tokens=count))
    log.close()
    text, page = status_text(tmp_path), Page(write_report(tmp_path)).text
    for said in (text, page):
        assert ("no token" in said) == (words is not None)
        assert words is None or words in said
    assert ("480 completion tokens (12 in the loss)" in page) == (counts == (5, 7))


@pytest.mark.parametrize("read", [status_text, write_report])
def test_a_folder_without_a_run_is_a_clear_error(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(UserError, match="there is no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no run in this folder"):
        read(tmp_path)


def test_a_damaged_file_of_a_run_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json: not the state of a run"):
        status_text(tmp_path)
    begin(tmp_path)
    (tmp_path / "ledger.sqlite").write_text("not a database, but long enough to be looked at" * 50)
    with pytest.raises(UserError, match=r"ledger\.sqlite: the ledger cannot be read"):
        status_text(tmp_path)
