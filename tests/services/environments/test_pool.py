"""Environments in processes of their own: what answers, and what becomes of those that fail."""

import asyncio
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments import child
from sdft.services.environments.base import Done
from sdft.services.environments.child import EpisodeLost
from sdft.services.environments.pool import Environments

RECORD = {"id": "row-1", "prompt": [{"role": "user", "content": "Count."}], "answer": None}


def environment(**settings: Any) -> Environments:
    given = {"type": "tests.fakes.environments:Counting", "step_timeout_s": 0.5, "max_answer_chars": 100}
    return Environments(EnvironmentConfig.model_validate(given | settings))


async def played(environments: Environments, *replies: str, record: dict[str, Any] = RECORD) -> list[Any]:
    """Return what answers each reply of an episode; the message of the loss at its end, if it is lost."""
    found: list[Any] = []
    async with environments.room(1):
        try:
            episode = await environments.begin(record)
            try:
                found += [await episode.step(reply) for reply in replies]
            finally:
                await episode.close()
        except EpisodeLost as lost:
            found.append(str(lost))
    return found


def run(*replies: str, **settings: Any) -> list[Any]:
    async def go() -> list[Any]:
        environments = environment(**settings)
        try:
            return await played(environments, *replies)
        finally:
            await environments.stop()

    return asyncio.run(go())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_episode_to_its_end() -> None:
    assert run("one", "yes") == [user("row-1 heard one"), Done(True, "row-1 after 2")]
    assert run("a", "b", "c", settings={"turns": 3})[2] == Done(False, "row-1 after 3")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("raise", user("KeyError: 'lamp'")),
        ("sleep", user("no answer within 0.5 s")),
        ("flood", user("x" * 100 + "\n[cut: the answer has 100000 characters]")),
        ("bytes", user("TypeError: 'int' object is not subscriptable")),
        ("print", user("printed")),
        ("read", user("EOFError: EOF when reading a line")),
        ("tool", [{"role": "tool", "content": "21 degrees", "name": "thermometer"}]),
    ],
)
def test_what_a_tool_does_wrong_is_an_answer_and_the_episode_goes_on(reply: str, answer: Any) -> None:
    assert run(reply, "yes") == [answer, Done(True, "row-1 after 2")]


def test_a_process_that_ends_or_blocks_loses_its_episodes_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE_S", 1.0)

    async def go() -> list[list[Any]]:
        environments = environment()
        try:
            return [
                await played(environments, "exit"),
                await played(environments, "one", "yes"),
                await played(environments, "block"),
                await played(environments, "one", "yes"),
            ]
        finally:
            await environments.stop()

    ended, second, blocked, fourth = asyncio.run(go())
    assert ended == ["the environment's process ended with exit code 3"]
    assert blocked == ["the environment blocked its process for 1.5 s in step"]
    assert second[-1] == fourth[-1] == Done(True, "row-1 after 2")


def test_an_episode_that_does_not_begin_is_closed(tmp_path: Path) -> None:
    async def go() -> list[list[Any]]:
        environments = environment()
        try:
            broken = await played(environments, "one", record=RECORD | {"answer": [str(tmp_path / "closed")]})
            dated = await played(environments, "one", record=RECORD | {"answer": date(2026, 1, 1)})
            return [broken, dated, await played(environments, "one", "yes")]
        finally:
            await environments.stop()

    broken, dated, later = asyncio.run(go())
    assert broken == ["reset failed: RuntimeError: no such house"]
    assert (tmp_path / "closed").read_text() == "closed"
    assert dated == ["a column of the row is no JSON: Object of type date is not JSON serializable"]
    assert later[-1] == Done(True, "row-1 after 2")


def test_steps_that_wait_for_each_other_do_not_count_as_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of 0.6 s block the process one after the other; the limit of each is 1.5 s."""
    monkeypatch.setattr(child, "GRACE_S", 1.0)

    async def go() -> list[list[Any]]:
        environments = environment(concurrent=6)
        try:
            return await asyncio.gather(*(played(environments, "work", "yes") for _ in range(6)))
        finally:
            await environments.stop()

    assert {answers[-1] for answers in asyncio.run(go())} == {Done(True, "row-1 after 2")}


def test_what_a_process_leaves_behind_holds_nothing_up() -> None:
    before = sleeping()

    async def go() -> list[list[Any]]:
        environments = environment()
        try:
            return [await played(environments, "leave"), await played(environments, "one", "yes")]
        finally:
            await environments.stop()

    left, later = asyncio.run(go())
    assert left == ["the environment's process ended with exit code 4"]
    assert later[-1] == Done(True, "row-1 after 2")
    assert sleeping() <= before


def sleeping() -> set[int]:
    """Return the processes that the environment may leave behind. Those that have ended do not count."""
    running = [p.info for p in psutil.process_iter(["pid", "name", "status"])]
    return {p["pid"] for p in running if p["name"] == "sleep" and p["status"] != psutil.STATUS_ZOMBIE}


def test_episodes_run_beside_each_other_up_to_the_limit() -> None:
    async def go() -> tuple[float, list[list[Any]]]:
        environments = environment(concurrent=4, processes=2, step_timeout_s=0.4)
        try:
            await played(environments, "one", "yes")
            began = asyncio.get_running_loop().time()
            found = await asyncio.gather(*(played(environments, "sleep", "yes") for _ in range(8)))
            return asyncio.get_running_loop().time() - began, found
        finally:
            await environments.stop()

    seconds, found = asyncio.run(go())
    assert [answers[-1] for answers in found] == [Done(True, "row-1 after 2")] * 8
    assert seconds >= 0.8  # two rounds of four


def test_no_process_survives() -> None:
    async def go() -> list[int]:
        environments = environment(processes=2)
        await asyncio.gather(*(played(environments, "one") for _ in range(2)))
        children = psutil.Process().children()
        alive = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
        pids = [child.pid for child in alive if "environments.process" in " ".join(child.cmdline())]
        await environments.stop()
        return pids

    pids = asyncio.run(go())
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
