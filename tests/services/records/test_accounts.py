"""The accounts of a run: the schedule, the ledger, checkpoints and the plan."""

import asyncio
import itertools
import os
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from sdft.actors.shared.process import available_memory_gib
from sdft.actors.shared.types import SampleId
from sdft.learner.group import LearnerGroup
from sdft.services.analysis.status import latest_checkpoint
from sdft.services.config.run import RunConfig
from sdft.services.data.schedule import StageSchedule, _order, sample_seed
from sdft.services.monitoring.console import Progress
from sdft.services.planning.plan import engine_settings, make_plan
from sdft.services.planning.shape import ModelShape
from sdft.services.records import checkpoints
from sdft.services.records.checkpoints import CheckpointState
from sdft.services.records.ledger import Ledger, LedgerError, restore_ledger
from sdft.services.training.checkpointer import Checkpointer
from simulation.cluster import Case, prepared
from tests.fakes.sources import numbered

SHAPE = ModelShape(135_000_000, 30, 576, 1536, 49152, 9)
STATE = CheckpointState(step=2, ranks=1, zero_stage=1, dtype="bfloat16", fingerprint="f")


def samples(*indices: int) -> list[SampleId]:
    return [SampleId(0, 0, i, 0) for i in indices]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite")


def test_epochs_train_on_every_demonstration_as_often_as_every_other() -> None:
    schedule = StageSchedule(numbered(10), batch_size=4, generations=2, seed=3, limit=30)
    assert schedule.last == 8  # 30 prompts in batches of 4, the last of 2
    issued = [s for step in range(1, 9) for s in schedule.batch(step)]
    assert len(issued) == len(set(issued)) == 60
    assert {(s.epoch, s.record, s.generation) for s in issued} == {
        (e, i, g) for e in range(3) for i in range(10) for g in range(2)
    }
    assert [s.epoch for s in issued] == sorted(s.epoch for s in issued)
    for step in range(9):
        through = Counter((s.stage, s.epoch) for before in range(1, step + 1) for s in schedule.batch(before))
        assert schedule.issued_through(step) == through


def test_an_audit_checks_each_epoch() -> None:
    """A surplus in one epoch does not compensate for a missing sample in another."""
    accounts = Ledger(Path(":memory:"))
    accounts.issue([SampleId(0, 0, 0, 0), SampleId(0, 1, 0, 0)], step=1)
    assert accounts.audit({(0, 0): 1, (0, 1): 1}) == (0, 0, 2)
    with pytest.raises(LedgerError, match="stage 0, epoch 1: 0 samples were issued"):
        accounts.audit({(0, 0): 1})
    with pytest.raises(LedgerError, match="epoch 0: 2 samples were issued"):
        accounts.audit({(0, 0): 2, (0, 1): 0})


def test_the_order_changes_with_the_epoch_and_the_seed_and_nothing_else() -> None:
    def orders(seed: int) -> list[list[int]]:
        schedule = StageSchedule(numbered(50), 50, 1, seed, limit=100)
        return [[s.record for s in schedule.batch(step)] for step in (1, 2)]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1]
    assert orders(0)[0] != orders(1)[0]


def test_the_order_of_an_epoch_is_computed_once() -> None:
    """The order of an epoch is computed once. Computing it for each sample would take 60 ms per sample."""
    schedule = StageSchedule(numbered(100_000), 2000, 1, 0, limit=100_000)
    _order.cache_clear()
    assert len({s.record for s in schedule.batch(1)}) == 2000
    assert _order.cache_info().misses == 1


def test_a_samples_seed_is_its_own() -> None:
    every = [SampleId(*place) for place in itertools.product(range(2), range(3), range(20), range(2))]
    seeds = {sample_seed(run, s) for run in range(3) for s in every}
    assert len(seeds) == 3 * len(every)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_sample_goes_through_every_state_once(ledger: Ledger) -> None:
    ledger.issue(samples(0, 1, 2), step=1)
    assert ledger.audit({(0, 0): 3}) == (0, 0, 3)
    ledger.advance(samples(0, 1), "sampled", [5, 7])
    ledger.advance(samples(0, 1), "scored")
    ledger.advance(samples(0), "trained")
    ledger.drop(samples(1)[0], "too long")
    assert ledger.counts() == {"trained": 1, "dropped": 1, "issued": 1}
    assert ledger.audit({(0, 0): 3}) == (1, 1, 1)


def test_after_a_restart_only_what_was_in_flight_is_issued_again(ledger: Ledger) -> None:
    ledger.issue(samples(0, 1, 2, 3), step=1)
    for state in ("sampled", "scored", "trained"):
        ledger.advance(samples(0), state)
    ledger.advance(samples(1), "sampled")
    ledger.drop(samples(2)[0], "too long")
    assert ledger.forget_in_flight() == 2
    assert ledger.audit({(0, 0): 2}) == (1, 1, 0)
    ledger.issue(samples(1, 3), step=2)
    assert ledger.audit({(0, 0): 4}) == (1, 1, 2)


def test_a_sample_issued_twice_is_an_error_and_changes_nothing(ledger: Ledger) -> None:
    ledger.issue(samples(0), step=1)
    with pytest.raises(LedgerError, match="step 2: a sample would be issued a second time"):
        ledger.issue(samples(5, 0), step=2)
    assert ledger.counts() == {"issued": 1}


def test_a_sample_moved_out_of_turn_is_an_error_and_moves_no_other(ledger: Ledger) -> None:
    ledger.issue(samples(0, 1), step=1)
    ledger.advance(samples(0), "sampled")
    with pytest.raises(LedgerError, match="1 of 2 samples cannot become scored"):
        ledger.advance(samples(0, 1), "scored")
    assert ledger.counts() == {"sampled": 1, "issued": 1}


def test_a_trained_sample_is_never_trained_or_dropped_again(ledger: Ledger) -> None:
    ledger.issue(samples(0), step=1)
    for state in ("sampled", "scored", "trained"):
        ledger.advance(samples(0), state)
    with pytest.raises(LedgerError):
        ledger.advance(samples(0), "trained")
    with pytest.raises(LedgerError, match="not in flight"):
        ledger.drop(samples(0)[0], "late")


def test_an_audit_that_does_not_add_up_says_what_there_is(ledger: Ledger) -> None:
    ledger.issue(samples(0, 1), step=1)
    with pytest.raises(
        LedgerError, match="stage 0, epoch 0: 3 samples were issued, but the ledger has 0 trained, 0 dropped and 2"
    ):
        ledger.audit({(0, 0): 3})


def test_a_restored_ledger_is_the_one_that_was_saved(ledger: Ledger, tmp_path: Path) -> None:
    ledger.issue(samples(0), step=1)
    ledger.copy_to(tmp_path / "copy")
    ledger.advance(samples(0), "sampled")
    ledger.close()
    restore_ledger(tmp_path / "copy", tmp_path / "ledger.sqlite")
    restored = Ledger(tmp_path / "ledger.sqlite")
    assert restored.counts() == {"issued": 1}
    restored.close()
    restore_ledger(None, tmp_path / "ledger.sqlite")
    assert Ledger(tmp_path / "ledger.sqlite").counts() == {}


def save(run_dir: Path, step: int, keep: int = 2) -> Path:
    part = checkpoints.begin(run_dir, step)
    (part / "student").mkdir()
    (part / "student" / "weights").write_bytes(step.to_bytes(4) * 250)
    folder, notes = checkpoints.commit(part, run_dir, replace(STATE, step=step), keep)
    assert notes == []
    return folder


def test_the_newest_whole_checkpoint_is_found_and_the_oldest_go(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step)
    folders = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert folders == ["step-000004", "step-000006"]
    folder, notes = checkpoints.newest(tmp_path)
    assert folder is not None
    assert (checkpoints.read_state(folder), notes) == (replace(STATE, step=6), [])
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000006"


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    root = save(tmp_path, 2).parent
    part = [f"{root}/.part-step-000002{name}" for name in ("/state.json", "/student/weights", "/manifest.json")]
    folders = [f"{root}/.part-step-000002/student", f"{root}/.part-step-000002", f"{root}"]
    assert synced == [*part, *folders, f"{root}/.latest.part"]


def test_checkpoints_are_in_the_order_of_their_steps_and_not_of_their_names(tmp_path: Path) -> None:
    save(tmp_path, 999_950)
    last = save(tmp_path, 1_000_000)
    assert checkpoints.newest(tmp_path)[0] == latest_checkpoint(tmp_path) == last
    assert checkpoints.newest(tmp_path, before=1_000_000)[0] == last.with_name("step-999950")
    assert checkpoints.set_aside(tmp_path, after=1_000_000) == []
    save(tmp_path, 1_000_050, keep=1)
    assert list(checkpoints.folders(tmp_path)) == [1_000_050]


def test_stop_waits_for_a_commit_in_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Saved:
        """The learner's part of a checkpoint: writes nothing."""

        async def save(self, folder: Path) -> None: ...

        async def written(self) -> None: ...

    def slowly(*arguments: Any) -> tuple[Path, list[str]]:
        time.sleep(0.2)
        return commit(*arguments)

    commit = checkpoints.commit
    monkeypatch.setattr(checkpoints, "commit", slowly)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    one = prepared(Case("commit", engines=1, steps=3), 8)
    progress = Progress(Console(quiet=True), 3, "test")

    async def run() -> None:
        writer = Checkpointer(one, tmp_path, cast(LearnerGroup, Saved()), ledger, progress)
        await writer.save(1, None)
        await asyncio.sleep(0.1)
        await writer.stop()
        assert checkpoints.newest(tmp_path)[0] == checkpoints.folder_of(tmp_path, 1)

    asyncio.run(run())
    ledger.close()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: (f / "student/weights").write_bytes(b"\7" * 1000), "student/weights is not as it was written"),
        (lambda f: (f / "student/weights").unlink(), "student/weights is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: object, reason: str) -> None:
    good, bad = save(tmp_path, 2), save(tmp_path, 4)
    assert callable(damage)
    damage(bad)
    folder, notes = checkpoints.newest(tmp_path)
    assert folder == good
    assert reason in notes[0]
    # A new checkpoint of the same step replaces the damaged folder.
    assert checkpoints.newest(save(tmp_path, 4).parent.parent)[0] == bad


def test_a_checkpoint_that_was_never_finished_is_not_seen_and_its_leftovers_go(tmp_path: Path) -> None:
    part = checkpoints.begin(tmp_path, 2)
    (part / "half").write_text("x")
    assert checkpoints.newest(tmp_path) == (None, [])
    again = checkpoints.begin(tmp_path, 4)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [again.name]


def config(**sections: object) -> RunConfig:
    return RunConfig.model_validate({"model": "m", "data": {"train": "t"}, "training": {"steps": 1}} | sections)


def test_the_plan_has_a_part_for_each_process() -> None:
    plan = make_plan(config(actors={"student": {"replicas": 2}}, learner={"ranks": 2}), SHAPE, [100])
    assert [p.name for p in plan.parts] == [
        "student engine 0", "student engine 1", "teacher engine 0", "learner rank 0", "learner rank 1",
    ]  # fmt: skip
    assert plan.cpus == sum(p.cpus for p in plan.parts)
    assert all(p.name in plan.text() for p in plan.parts)


def test_a_live_teacher_has_no_engine_and_no_average() -> None:
    ema, live = (make_plan(config(teacher={"weights": w}), SHAPE, [100]) for w in ("ema", "live"))
    assert list(live.pools) == ["student"]
    assert live.memory_gib < ema.memory_gib
    assert live.learners[0].memory_gib < ema.learners[0].memory_gib


def test_a_further_pool_is_in_the_plan_if_there_is_something_to_evaluate() -> None:
    """The learner's first rank holds a snapshot of its own for it."""
    sets = {"sets": [{"name": "quiz", "file": "q.jsonl", "grader": "exact"}]}
    held_out: dict[str, object] = {"held_out": {"role": "evaluation", "replicas": 2, "cpus": 0.25}}
    idle, plain = make_plan(config(actors=held_out), SHAPE, [100]), make_plan(config(evaluation=sets), SHAPE, [100])
    assert list(idle.pools) == list(plain.pools) == ["student", "teacher"]
    plan = make_plan(config(actors=held_out, evaluation=sets), SHAPE, [100])
    assert list(plan.pools) == ["student", "teacher", "held_out"]
    assert [p.name for p in plan.parts[2:]] == ["held_out engine 0", "held_out engine 1", "learner rank 0"]
    assert plan.cpus == plain.cpus + 0.5
    assert "held_out engine 1" in plan.text()
    width = {"bfloat16": 2, "float32": 4}[config().dtype]
    assert plan.learners[0].memory_gib - plain.learners[0].memory_gib == pytest.approx(135e6 * width / 2**30)


def test_gpus_are_asked_for_with_cuda_only() -> None:
    assert make_plan(config(), SHAPE, [100]).gpus == 0
    assert make_plan(config(device="cuda"), SHAPE, [100]).gpus == 3


def test_an_engine_on_a_gpu_measures_its_cache_unless_its_size_is_given(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    def gib(**changes: object) -> float | None:
        return engine_settings(config(**changes), tmp_path, "student").kv_cache_gib

    shared = {"student": {"gpus": 0.3, "kv_cache_gib": 2}, "teacher": {"gpus": 0.3, "kv_cache_gib": 2}}
    assert (gib(), gib(device="cuda"), gib(device="cuda", actors=shared)) == (1, None, 2)


def test_an_engine_with_a_cache_of_a_given_size_needs_no_share_of_its_gpu_free(tmp_path: Path) -> None:
    """vLLM starts only if that share is free. On a GPU with many engines it would refuse although there is room."""
    (tmp_path / "config.json").write_text("{}")
    shares = [
        engine_settings(config(device="cuda", actors={"student": {"kv_cache_gib": gib}}), tmp_path, "student")
        for gib in (None, 1)
    ]
    assert [s.gpu_memory_utilization for s in shares] == [0.9, 0.05]


def test_memory_that_holds_cached_files_counts_as_available(tmp_path: Path) -> None:
    """With free pages alone, a start would fail on any machine that has read many files."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1048576 kB\nMemAvailable: 12582912 kB\n")
    assert available_memory_gib(tmp_path / "meminfo") == 12
    assert available_memory_gib(tmp_path / "nothing") > 0


def test_a_run_resumed_from_an_earlier_checkpoint_sets_later_ones_aside(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    (note,) = checkpoints.set_aside(tmp_path, after=4)
    (aside,) = (tmp_path / "checkpoints").glob("aside-*-step-000006")
    assert note == f"the checkpoint of step 6 is set aside as {aside}"
    assert (aside / "manifest.json").exists()
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000004"
    save(tmp_path, 5, keep=2)
    assert checkpoints.newest(tmp_path) == (tmp_path / "checkpoints" / "step-000005", [])
    assert (tmp_path / "checkpoints" / "step-000004").exists()
