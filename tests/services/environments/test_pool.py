"""Environments in processes of their own: what answers, and what becomes of those that fail."""

import asyncio
from pathlib import Path
from typing import Any

import psutil
import pytest

from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments import pool
from sdft.services.environments.base import Done
from sdft.services.environments.pool import Environments, EpisodeLost

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
        ("tool", [{"role": "tool", "content": "21 degrees", "name": "thermometer"}]),
    ],
)
def test_what_a_tool_does_wrong_is_an_answer_and_the_episode_goes_on(reply: str, answer: Any) -> None:
    assert run(reply, "yes") == [answer, Done(True, "row-1 after 2")]


def test_a_process_that_ends_or_blocks_loses_its_episodes_and_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GRACE_S", 1.0)

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


def test_an_episode_that_does_not_begin() -> None:
    async def go() -> list[Any]:
        environments = environment()
        try:
            return await played(environments, "one", record=RECORD | {"answer": "broken"})
        finally:
            await environments.stop()

    assert asyncio.run(go()) == ["reset failed: RuntimeError: no such house"]


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
        pids = [
            child.pid for child in psutil.Process().children() if "environments.process" in " ".join(child.cmdline())
        ]
        await environments.stop()
        return pids

    pids = asyncio.run(go())
    assert len(pids) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
