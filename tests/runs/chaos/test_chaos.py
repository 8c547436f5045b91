"""A strict run in stages survives killed and stopped processes and damaged files with identical results.

    make chaos    # 200 kills instead of 12

Every demonstration is trained exactly as often as in an uninterrupted run, metrics and final weights are equal, and no
process or file remains on the machine. CHAOS_KILLS sets the number of kills, CHAOS_SEED the random choices.

At least three rounds hit a run that steps, then one that recovers, then one that steps under another driver. The first
and the third hit each kind of process: it is killed, and once stopped. So few kills reach every case.
"""

import itertools
import os
import random
import resource
import signal
import sqlite3
import statistics
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from sdft.services.records.rows import read_jsonl
from tests.runs.chaos.processes import KINDS, Process, of_run, snapshot_of
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import LONG, STAGE, command, finish, in_stages_of_pairs, metrics, wait_until, write_run

KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
AT_ONCE = (3, 5, 5)  # processes to kill or stop in one round; one of these numbers
STEPS = max(LONG, KILLS + 12)
STUDENT = Path("checkpoints") / f"step-{STEPS:06d}" / "student" / "model.safetensors"
SIGNALS = (signal.SIGKILL, signal.SIGSTOP)


def named(kind: str, number: signal.Signals) -> str:
    """Return how the report calls a process that got this signal."""
    return f"{kind} {'stopped' if number == signal.SIGSTOP else 'killed'}"


class Monkey:
    """Disturbs one run until it has killed enough processes, then lets the run finish."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.random = random.Random(SEED)
        self.log = run_dir.with_suffix(".log")
        self.killed: Counter[str] = Counter()
        self.recoveries: list[float] = []  # seconds from a round's kills to the next step
        self.rounds: Counter[str] = Counter()  # by the state of the run when they began
        self.recovering = False
        self.driver = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start a driver. Each driver uses another weight transport than the previous one."""
        transport = "memory" if self.killed["driver killed"] % 2 else "broadcast"
        words = [*command(self.config, self.run_dir), "--set", f"weights.transport={transport}"]
        with self.log.open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=log)

    def rows(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        return len(read_jsonl(path)) if path.exists() else 0

    def step(self, what: str) -> None:
        """Wait for one more row of metrics, of any step. A rewind shortens the file first."""
        lowest = self.rows()

        def more() -> bool:
            nonlocal lowest
            rows = self.rows()
            lowest = min(lowest, rows)
            return rows > lowest

        wait_until(more, what, self.driver)

    def said(self, text: str) -> int:
        return self.log.read_text(errors="replace").count(text)

    def take(self) -> None:
        """Kill or stop several processes at once: one round. Every other round hits a run that is still recovering."""
        began = time.monotonic()
        wait_until(lambda: bool(of_run(self.driver.pid)), "there was a process to kill", self.driver)
        self.rounds["recovering" if self.recovering else "stepping"] += 1
        chosen = self.choose(of_run(self.driver.pid))
        for process in chosen:
            number = self.signal_for(process.kind)
            if process.send(number):
                self.killed[named(process.kind, number)] += 1
        self.recovering = not self.recovering
        if self.recovering:
            time.sleep(self.random.uniform(0, 8))
        else:
            self.step(f"a step after {', '.join(p.kind for p in chosen)} had been lost")
            self.recoveries.append(time.monotonic() - began)

    def choose(self, processes: list[Process]) -> list[Process]:
        """Return some of the processes, at random; in a run that steps, at least one of each kind."""
        left = self.random.sample(processes, len(processes))
        if not self.recovering:
            first = {process.kind: process for process in left}.values()
            left = [*first, *(process for process in left if process not in first)]
        return left[: self.random.choice(AT_ONCE)]

    def signal_for(self, kind: str) -> signal.Signals:
        """Return SIGKILL first, then SIGSTOP in a run that steps, then either at random.

        Only the start limit detects a process that is stopped while it starts: the run waits for as long as that.
        """
        killed, stopped = (self.killed[named(kind, number)] for number in SIGNALS)
        if stopped:
            return signal.SIGSTOP if self.random.random() < 0.15 else signal.SIGKILL
        return signal.SIGSTOP if killed and not self.recovering else signal.SIGKILL

    def kill_driver(self) -> None:
        """Kill the driver and damage the newest checkpoint: the run must resume from the one before."""
        began = time.monotonic()
        folder = self.run_dir / "checkpoints"
        wait_until(lambda: len(list(folder.glob("step-*"))) > 1, "there were two checkpoints", self.driver)
        self.driver.kill()
        self.driver.wait()
        newest = max(folder.glob("step-*"))
        self.killed["driver killed"] += 1
        victim = self.random.choice([p for p in newest.rglob("*") if p.is_file() and p.stat().st_size])
        with victim.open("r+b") as file:
            file.seek(self.random.randrange(victim.stat().st_size))
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 255]))
        self.driver = self.start()
        wait_until(lambda: self.said(f"{newest} is damaged") > 0, "the damaged checkpoint was found", self.driver)
        self.step("a step after the driver had been killed")
        self.recoveries.append(time.monotonic() - began)

    def fill_disk(self) -> None:
        """Limit the size of the learner's files until a checkpoint has failed."""
        (learner,) = [p.pid for p in of_run(self.driver.pid) if p.kind == "learner rank"]
        limits = resource.prlimit(learner, resource.RLIMIT_FSIZE)
        resource.prlimit(learner, resource.RLIMIT_FSIZE, (4096, limits[1]))
        wait_until(lambda: self.said("could not be written") > 0, "a checkpoint had failed", self.driver)
        resource.prlimit(learner, resource.RLIMIT_FSIZE, limits)
        self.step("a step after the disk had been full")

    def damage_snapshot(self) -> None:
        """Overwrite bytes of a snapshot in shared memory, between packing and loading, until an engine detects it."""
        (learner,) = [p.pid for p in of_run(self.driver.pid) if p.kind == "learner rank"]
        path = snapshot_of(learner, "student")
        assert path is not None
        with path.open("r+b", buffering=0) as memory:
            deadline = time.monotonic() + 60
            while self.said("arrived damaged") == 0:
                assert time.monotonic() < deadline, "no engine found the damage in 60 s"
                memory.seek(1000)
                memory.write(bytes([self.random.randrange(256)]))
                time.sleep(0.002)
        self.step("a step after a snapshot had been damaged")

    def run(self) -> None:
        self.step("the first step")
        assert (
            self.said("the engines load them from memory") == 0
        )  # otherwise the broadcasts to be disturbed never happen
        self.fill_disk()
        self.damage_snapshot()
        while self.killed.total() < KILLS:
            if not self.recovering:
                if self.rounds["stepping"] % 2:
                    self.step("a step before the driver is killed")
                    self.kill_driver()
                # Rounds are spread over the whole run, so that they also hit the start of its stages.
                while self.rows() < (STEPS - 6) * self.killed.total() / KILLS:
                    self.step("a step between two rounds")
            self.take()
        assert self.driver.wait(timeout=500) == 0, self.log.read_text()[-3000:]


@pytest.mark.timeout(60 * KILLS)
def test_a_run_under_chaos_equals_an_uninterrupted_run(
    tiny_model: Path, undisturbed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Only the start limit detects a process that is stopped while it starts.
    limits = {"health_timeout_s": 4, "max_restarts": 1000, "start_timeout_s": 60}
    config = in_stages_of_pairs(write_run(tmp_path, tiny_model, "bfloat16", STEPS, **limits), STAGE)
    settings = yaml.safe_load(config.read_text())
    for role in ("student", "teacher"):
        settings["actors"][role] |= limits
    settings["weights"] = {"timeout_s": 20}
    config.write_text(yaml.safe_dump(settings))
    whole = undisturbed[1]
    if STEPS != LONG:
        whole = tmp_path / "whole"
        finish(config, whole)
    before = on_machine()

    monkey = Monkey(config, tmp_path / "disturbed")
    try:
        monkey.run()
    finally:
        monkey.driver.kill()
        print(monkey.log.read_text()[-6000:])
    with capsys.disabled():
        kinds = ", ".join(f"{count} x {kind}" for kind, count in sorted(monkey.killed.items()))
        print(
            f"\nchaos: {kinds}; {monkey.rounds.total()} rounds; to the next step "
            f"{statistics.median(monkey.recoveries):.0f} s (median), {max(monkey.recoveries):.0f} s (longest)"
        )

    cases = {named(kind, number) for kind in KINDS.values() for number in SIGNALS}
    assert cases | {"driver killed"} <= monkey.killed.keys()
    assert monkey.rounds.keys() == {"stepping", "recovering"}
    run_dir = tmp_path / "disturbed"
    assert metrics(run_dir) == metrics(whole)
    for name in ("eval.jsonl", "samples.jsonl"):
        assert read_jsonl(run_dir / name) == read_jsonl(whole / name)
    assert (run_dir / STUDENT).read_bytes() == (whole / STUDENT).read_bytes()
    ledger = sqlite3.connect(run_dir / "ledger.sqlite")
    rows = ledger.execute("SELECT stage, epoch, idx, generation, state FROM samples").fetchall()
    ledger.close()
    assert {state for *_, state in rows} == {"trained"}
    assert len(rows) == 4 * STEPS
    # Nine demonstrations in turn: each stage trains both rollouts of each demonstration once per complete epoch.
    for stage, first in enumerate(range(0, STEPS, STAGE)):
        epochs = 2 * min(STAGE, STEPS - first) // 9
        counts = Counter((index, rollout) for of, epoch, index, rollout, _ in rows if of == stage and epoch < epochs)
        assert counts == Counter(dict.fromkeys(itertools.product(range(9), range(2)), epochs))
    assert new_since(before) == set()
