"""The waits of a run, as the watchdog reports them."""

import asyncio
from pathlib import Path

import pytest

from sdft.actors.shared.waiting import Waits, silent_for, within
from sdft.services.monitoring.watchdog import Watchdog
from sdft.services.records.waits import read_waiting


def test_a_stall_is_reported_once_and_again_after_a_wait_has_ended(tmp_path: Path) -> None:
    async def run() -> None:
        waits, notices = Waits(), list[str]()
        watchdog = asyncio.create_task(Watchdog(tmp_path, 0.2, notices.append, waits).run())
        number = waits.begin("student engine 0 to generate 32 sequences", 1800)
        waits.begin("the learner's step", 3600)
        await asyncio.sleep(0.6)
        assert len(notices) == 1
        assert notices[0].startswith("no wait has ended for 0.2 s; waiting for student engine 0 to generate 32 sequ")
        assert "the learner's step (0 s of at most 3600)" in notices[0]
        stacks = Path(notices[0].rpartition(": ")[2]).read_text()
        assert "student engine 0 to generate 32 sequences" in stacks
        assert "test_watchdog.py" in stacks
        assert [w.what for w in read_waiting(tmp_path)][1] == "the learner's step"
        waits.end(number)
        await asyncio.sleep(0.6)
        assert len(notices) == 2
        assert "student engine" not in notices[1]
        watchdog.cancel()
        await asyncio.gather(watchdog, return_exceptions=True)
        assert read_waiting(tmp_path) == []

    asyncio.run(run())


def test_a_stall_is_reported_even_if_no_file_can_be_written(tmp_path: Path) -> None:
    async def run() -> None:
        run_dir, waits, notices = tmp_path / "run", Waits(), list[str]()
        waits.begin("the learner's step", 3600)
        watchdog = asyncio.create_task(Watchdog(run_dir, 0.2, notices.append, waits).run())
        await asyncio.sleep(0.4)
        assert "waiting for the learner's step (0 s of at most 3600); the stacks of the tasks could not" in notices[0]
        run_dir.mkdir()
        await asyncio.sleep(0.2)
        assert [w.what for w in read_waiting(run_dir)] == ["the learner's step"]
        watchdog.cancel()
        await asyncio.gather(watchdog, return_exceptions=True)

    asyncio.run(run())


def test_a_wait_that_is_too_long_says_what_it_was_for() -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError, match=r"waited 0.05 s for teacher engine 1 to score"):
            await within(asyncio.sleep(5), 0.05, "teacher engine 1 to score")

    asyncio.run(run())


def test_a_wait_within_a_wait_says_which_it_was() -> None:
    async def run() -> None:
        inner = within(asyncio.sleep(5), 0.05, "the teachers' weights")
        with pytest.raises(TimeoutError, match=r"^waited 0.05 s for the teachers' weights$"):
            await within(inner, 60, "the rollouts of step 5")

    asyncio.run(run())


def test_a_cancellation_that_comes_with_an_answer_takes_effect() -> None:
    """The supervision of an engine asks repeatedly; a lost cancellation would let it run forever."""

    async def heard(passes: int) -> bool:
        """Cancel after this number of the loop's passes; return whether the cancellation took effect."""
        answer = asyncio.get_running_loop().create_future()

        async def asked() -> None:
            await answer

        asking = asyncio.create_task(silent_for(asked(), 60))
        await asyncio.sleep(0.01)
        answer.set_result(None)
        for _ in range(passes):
            await asyncio.sleep(0)
        accepted = asking.cancel()
        await asyncio.wait([asking])
        return asking.cancelled() == accepted

    assert [asyncio.run(heard(passes)) for passes in range(4)] == [True] * 4
