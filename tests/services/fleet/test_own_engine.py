"""A second implementation of the engine interface, tests/fakes/echo_engine.py, behind a real pool on Ray."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.actors.engine import own_engine
from sdft.actors.shared.own_code import NotImportable
from sdft.actors.shared.types import GenerateRequest, Sampling, Snapshot
from sdft.actors.transport.protocol import Learner
from sdft.services.config.run import RunConfig
from sdft.services.fleet.factory import engine_pool

ECHO = "tests.fakes.echo_engine:EchoEngine"
PROMPT = np.array([5, 6, 7], np.int32)
LEAST: dict[str, Any] = {"model": "m", "data": {"train": "t"}, "training": {"steps": 1}}


def no_learner() -> Learner:
    raise AssertionError("the weights are on the engines' own node")


def test_an_engine_of_a_users_own_samples_scores_and_is_updated_and_replaced(ray_cluster: None, tmp_path: Path) -> None:
    """The pool takes it from the configuration. An engine without streams loads the snapshot from memory."""
    (tmp_path / "config.json").write_text("{}")
    config = RunConfig.model_validate(LEAST | {"actors": {"student": {"engine": ECHO, "cpus": 0.1}}})
    notices: list[str] = []

    async def run() -> None:
        pool = engine_pool(config, tmp_path, (0,), 8, "student", [], notices.append, no_learner)
        await pool.start()
        (engine,) = pool.engines
        snapshot = Snapshot("student", 3, "", engine.process.node, 0, (), PROMPT, np.zeros(2, np.float32))
        async with pool.versions.offering(lambda: asyncio.sleep(0, snapshot), 30):
            (report,) = await pool.update_weights(snapshot)
        (rollout,) = await pool.generate([GenerateRequest(PROMPT)], Sampling(max_new_tokens=4))
        (scores,) = await pool.score([(PROMPT, rollout.completion_ids)], 2)
        assert (report.version, rollout.versions) == (3, ((3, 0, 4),))
        assert rollout.completion_ids.tolist() == [5, 6, 7, 5]
        assert scores.ids.tolist() == [[5, 6], [6, 7], [7, 8], [5, 6]]
        assert set(rollout.logprobs.tolist()) == {-4.0}
        with pytest.raises(Exception, match="EchoEngine receives no streams of weights"):
            await engine.attempt("connect", {})
        killed = Path(f"/proc/{engine.process.pid}/cmdline")
        engine._actor.kill()
        while killed.exists() and killed.read_bytes():  # on a busy machine it would still answer the next call
            await asyncio.sleep(0.05)
        (again,) = await pool.generate([GenerateRequest(PROMPT)], Sampling(max_new_tokens=4))
        assert (again.versions, again.completion_ids.tolist()) == (((3, 0, 4),), [5, 6, 7, 5])
        await pool.stop()

    asyncio.run(run())
    assert [notice.partition(" (process")[0] for notice in notices] == ["student engine 0", "student engine 0 is back"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tests.fakes.echo_engin:EchoEngine", "cannot be imported"),
        ("tests.fakes.echo_engine:Echo", "has no attribute 'Echo'"),
        ("collections:Counter", "is not a subclass of sdft.actors.engine.Engine"),
        ("sdft.actors.engine:Engine", "lacks generate, ping, probe, score, start, stop, update_weights of"),
    ],
)
def test_a_name_that_is_no_engine_is_refused(name: str, words: str) -> None:
    with pytest.raises(NotImportable, match=words):
        own_engine(name)
