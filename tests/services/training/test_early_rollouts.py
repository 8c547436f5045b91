"""Strict runs on GPUs sample the next rollouts while the teacher's weights are published, with the same results."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdft.actors.shared.drafts import Draft
from sdft.actors.shared.types import TeacherScores
from sdft.learner.types import StepResult
from sdft.services.records.rows import read_jsonl
from simulation.cluster import Case, Learner, Student, Teacher, drive, prepared, scores
from simulation.rates import Rates

BATCH, STEPS = 16, 8


class Versioned(Teacher):
    """Teacher engine whose scores have the version of its weights."""

    def score(self, pairs: list[Any], k: int) -> tuple[float, list[TeacherScores]]:
        return self.seconds_for(pairs), [scores(len(completion), self.version) for _, completion in pairs]


class Sampling(Student):
    """Student engine that records its batches."""

    def __init__(self, number: int, case: Case, events: list[str]) -> None:
        super().__init__(number, case)
        self._events = events

    def generate(self, *given: Any) -> Any:
        self._events.append("sample")
        return super().generate(*given)


class Recorder(Learner):
    """Records steps and checkpoints."""

    def __init__(self, case: Case, events: list[str]) -> None:
        super().__init__(0.1, case.rates)
        self._events = events

    async def train_step(self, sequences: list[Draft]) -> StepResult:
        self._events.append("learn")
        return await super().train_step(sequences)

    async def save(self, folder: Path) -> None:
        self._events.append("save")


def run(folder: Path, device: str, publish_s: float, save_every: int = 10**6) -> tuple[list[dict[str, Any]], list[str]]:
    """Run eight strict steps; return their metrics and the events."""
    folder.mkdir()
    case = Case(device, engines=1, staleness=0, steps=STEPS, rates=Rates(publish_s=publish_s))
    ready = prepared(case, BATCH)
    changed = {
        "device": device,
        "checkpoint": ready.config.checkpoint.model_copy(update={"every": save_every}),
        "weights": ready.config.weights.model_copy(update={"teacher_sync_every": 1}),
    }
    ready = replace(ready, config=ready.config.model_copy(update=changed))
    events: list[str] = []
    learner = Recorder(case, events)
    drive(ready, folder, case, lambda i: Sampling(i, case, events), learner, io.StringIO(), teacher=Versioned)
    return read_jsonl(folder / "metrics.jsonl"), events


def test_the_learner_publishes_the_teacher_while_the_student_samples(tmp_path: Path) -> None:
    (cpu, _), (cuda, _) = (run(tmp_path / device, device, publish_s=0.25) for device in ("cpu", "cuda"))
    saved = [slow["time_step_s"] - fast["time_step_s"] for slow, fast in zip(cpu, cuda, strict=True)]
    assert [round(s, 3) for s in saved[1:]] == [0.25] * (STEPS - 1), saved
    same = [key for key in cpu[0] if not key.startswith("time") and key != "tokens_per_s"]
    assert [[row[key] for key in same] for row in cpu] == [[row[key] for key in same] for row in cuda]


def test_scores_wait_for_a_teacher_that_is_published_for_longer_than_the_rollouts_take(tmp_path: Path) -> None:
    rows, _ = run(tmp_path / "slow", "cuda", publish_s=60)
    assert [row["teacher_version"] for row in rows] == list(range(STEPS))
    assert [row["student_version"] for row in rows] == list(range(STEPS))


def test_no_rollout_of_a_later_step_begins_before_a_checkpoint(tmp_path: Path) -> None:
    _, events = run(tmp_path / "saved", "cuda", publish_s=0.25, save_every=4)
    assert events == [*["sample", "learn"] * 4, "save"] * 2
