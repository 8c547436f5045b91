"""The number of engines follows the requests: the policy by itself, and a service with engines of a few lines."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sdft.services.config.service import ServiceConfig
from sdft.services.serving.scaling import Policy
from tests.fakes.service_engine import SLOW
from tests.fakes.small_service import checked_service, running


def changes(policy: Policy, loads: list[tuple[float, int]]) -> list[int]:
    """Return the number of engines after each (time, load)."""
    engines, found = policy.least, []
    for now, load in loads:
        engines += policy.change(now, load, engines)
        found.append(engines)
    return found


def test_a_queue_that_lasts_adds_engines_up_to_the_most() -> None:
    policy = Policy(least=1, most=3, room=4, grow_after_s=10, shrink_after_s=60)
    seconds = [0, 5, 9, 10, 15, 20, 30, 50]
    assert changes(policy, [(s, 20) for s in seconds]) == [1, 1, 1, 2, 2, 2, 3, 3]


def test_a_short_queue_adds_none() -> None:
    policy = Policy(least=1, most=3, room=4, grow_after_s=10, shrink_after_s=60)
    assert changes(policy, [(0, 20), (9, 4), (10, 20), (19, 20), (21, 4)]) == [1] * 5


def test_engines_with_little_to_do_leave_one_after_the_other() -> None:
    policy = Policy(least=1, most=3, room=4, grow_after_s=1, shrink_after_s=60)
    grown = changes(policy, [(0, 20), (1, 20), (2, 20), (3, 20)])
    assert grown[-1] == 3
    after = [3 + policy.change(now, 4, 3) for now in (10, 69, 70)]
    assert after == [3, 3, 2]
    assert [2 + policy.change(now, 2, 2) for now in (71, 130, 131)] == [2, 2, 1]
    assert policy.change(1000, 0, 1) == 0


def test_streams_that_begin_late_add_engines_and_keep_them() -> None:
    policy = Policy(least=1, most=2, room=4, grow_after_s=10, shrink_after_s=60, first_token_s=1.0)
    late = [(float(s), 3.0) for s in range(0, 200, 5)]

    def change(now: float, engines: int) -> int:
        return policy.change(now, 1, engines, [b for b in late if b[0] <= now])

    assert [change(now, 1) for now in (0, 5, 9, 10)] == [0, 0, 0, 1]
    assert [change(now, 2) for now in (60, 100, 150)] == [0, 0, 0]  # one engine would do, but for the delay
    early = [(float(s), 0.1) for s in range(200, 400, 5)]
    assert [policy.change(now, 1, 2, [*late, *early]) for now in (210, 269, 271)] == [0, 0, -1]
    assert Policy(1, 2, 4, 10, 60).change(100, 1, 1, late) == 0


def test_a_release_is_promoted_while_an_engine_does_not_come_up(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts with the release that the others have by then."""
    serving = {"replicas": 2, "start_timeout_s": 60}
    service = checked_service(tmp_path, tiny_model, serving=serving)

    async def run() -> None:
        async with running(service) as client:

            async def both(release: int) -> bool:
                return {e["release"] for e in (await client.got("status"))["engines"]} == {release}

            await client.until(lambda: both(1))
            slow = tmp_path / "slow"
            monkeypatch.setenv(SLOW, str(slow))
            slow.touch()
            os.kill((await client.got("status"))["engines"][1]["pid"], signal.SIGKILL)
            await client.teach("yes", "yes", "yes", "yes")
            assert (await client.release(2))["status"] == "served"
            assert not await both(2)
            slow.unlink()
            await client.until(lambda: both(2))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"serving": {"max_replicas": 5}}, "serving.max_replicas 5 is never reached: .* raise it to more than 128"),
        ({"serving": {"grow_after_s": 5}}, "grow_after_s has no effect without max_replicas"),
        ({"serving": {"first_token_s": 5}}, "first_token_s has no effect without max_replicas"),
        ({"serving": {"replicas": 3, "max_replicas": 2}}, "max_replicas 2 is less than replicas 3"),
        ({"serving": {"cluster": {"gpus": 0.5}}}, "set kv_cache_gib"),
        ({"serving": {"cluster": {"gpus": 1.5}}}, "gpus 1.5 must be a part of one GPU or a whole number"),
    ],
)
def test_settings_without_an_effect_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServiceConfig.model_validate(given)


def test_a_service_grows_and_shrinks_without_a_failed_request(tiny_model: Path, tmp_path: Path) -> None:
    serving = {"max_num_seqs": 2, "max_replicas": 2, "grow_after_s": 0.5, "shrink_after_s": 1.5}
    service = checked_service(tmp_path, tiny_model, serving=serving)

    async def run() -> None:
        async with running(service) as client:

            async def engines() -> int:
                found = (await client.got("status"))["engines"]
                return sum(e["release"] == 1 for e in found) if len(found) > 1 else -len(found)

            async def two() -> bool:
                return await engines() == 2

            async def one() -> bool:
                return await engines() == -1

            asked = [asyncio.create_task(client.ask("Hi", wait_s=3)) for _ in range(5)]
            await client.until(two)
            later = [asyncio.create_task(client.ask("Ho", wait_s=0.5)) for _ in range(2)]
            assert set(await asyncio.gather(*asked)) == {"release 1: Hi"}
            assert set(await asyncio.gather(*later)) == {"release 1: Ho"}
            await client.until(one)
            assert await client.ask("Hi") == "release 1: Hi"
            said = [notice["text"] for notice in (await client.got("status"))["notices"]]
            assert "engine 1 is added: 5 requests, 2 engines now" in said
            assert "engine 1 is removed: 0 requests, 1 engines now" in said

    asyncio.run(run())
