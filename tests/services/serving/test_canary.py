"""A canary in a service with engines of a few lines: who gets it, what feedback makes of it, and restarts."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sdft.services.config.service import ServiceConfig
from sdft.services.releases.canary import is_chosen
from sdft.services.releases.journal import read_state
from sdft.services.serving.audit import audit_of
from sdft.services.serving.check import Checked
from tests.fakes.small_service import Client, checked_service, copied, running

SHARE, FEW = 0.4, 8
USERS = [f"user-{i}" for i in range(30)]
CHOSEN = [user for user in USERS if is_chosen(2, user, SHARE)]
OTHERS = [user for user in USERS if user not in CHOSEN]


@pytest.fixture(scope="module")
def checked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    gate = {"canary": {"share": SHARE, "min_feedback": FEW}}
    folder = tmp_path_factory.mktemp("service")
    return checked_service(folder, tiny_model, gate=gate, serving={"replicas": 2}, window={"min_records": 4})


async def begun(client: Client) -> None:
    """Wait until release 2 is a canary and both engines are up."""
    await client.teach("yes", "yes", "yes", "yes")
    assert (await client.release(2))["status"] == "canary"
    await up(client)


async def up(client: Client) -> None:
    async def both() -> bool:
        return sorted(e["release"] or 0 for e in (await client.got("status"))["engines"]) == [1, 2]

    await client.until(both)


async def asked(client: Client, user: str) -> tuple[str, str]:
    """Return the release that answers a user, and the receipt."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "user": user}
    answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    assert answer.json()["choices"][0]["message"]["content"] == f"release {answer.headers['x-sdft-release']}: Hi"
    return answer.headers["x-sdft-release"], answer.json()["id"]


async def say(client: Client, receipt: str, **said: Any) -> None:
    (await client.post("/v1/feedback", json={"receipt": receipt} | said)).raise_for_status()


async def status(client: Client, release: int) -> str:
    return str((await client.got(f"releases/{release}"))["status"])


def test_a_share_of_the_users_gets_it_and_good_feedback_promotes_it(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            await begun(client)
            assert {(await asked(client, user))[0] for user in CHOSEN} == {"2"}
            assert {(await asked(client, user))[0] for user in OTHERS} == {"1"}
            await client.teach("yes", "yes", "yes", "yes")
            await client.until(lambda: doing(client, "tries release 2 on a share of the users"))
            assert (await client.got("status"))["counts"]["waiting"] == 4  # no window meanwhile
            for user in (*CHOSEN[:FEW], *OTHERS[:FEW]):
                receipt = (await asked(client, user))[1]
                for score in (0, 1) if user in CHOSEN else (1, 0):  # the last opinion counts
                    await say(client, receipt, score=score)
            await client.until(lambda: served(client, 2))
            assert {(await asked(client, user))[0] for user in (CHOSEN[0], OTHERS[0])} == {"2"}

    asyncio.run(run())
    assert audit_of(tmp_path / "run").faults == []


async def doing(client: Client, text: str) -> bool:
    return str((await client.got("status"))["doing"]).startswith(text)


async def served(client: Client, release: int) -> bool:
    return bool((await client.got("status"))["served"] == release)


def test_bad_feedback_refuses_it_after_a_restart(checked: Checked, tmp_path: Path) -> None:
    service = copied(checked, tmp_path / "run")

    async def first() -> None:
        async with running(service) as client:
            await begun(client)

    async def second() -> None:
        async with running(service) as client:
            await up(client)
            for i, user in enumerate(CHOSEN[:FEW]):
                said: dict[str, Any] = {"score": 0} if i else {"correction": "no"}
                await say(client, (await asked(client, user))[1], **said)
            for user in OTHERS[:FEW]:
                await say(client, (await asked(client, user))[1], score=1)

            async def refused() -> bool:
                return await status(client, 2) == "refused"

            await client.until(refused)
            await client.until(lambda: all_of(client, 1))
            assert (await asked(client, CHOSEN[0]))[0] == "1"

    asyncio.run(first())
    assert read_state(service.folder.journal).releases[2].status == "canary"
    asyncio.run(second())
    assert "canary 0 of 8 good, served release 8 of 8 good" in read_state(service.folder.journal).releases[2].reason


async def all_of(client: Client, release: int) -> bool:
    return {e["release"] for e in (await client.got("status"))["engines"]} == {release}


@pytest.mark.parametrize(("decision", "after"), [("promote", 2), ("rollback", 1), ("hold", 1)])
def test_a_person_decides_about_it(checked: Checked, tmp_path: Path, decision: str, after: int) -> None:
    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            await begun(client)
            (await client.post(f"/v1/releases/2/{decision}")).raise_for_status()
            await client.until(lambda: all_of(client, after))
            assert await status(client, 2) == {"promote": "served", "rollback": "refused", "hold": "held"}[decision]

    asyncio.run(run())


def test_users_that_a_canary_was_not_for_never_get_it_while_it_is_rolled_back(checked: Checked, tmp_path: Path) -> None:
    """Its engine ends its answers first, and takes no others before it has changed."""

    async def run() -> None:
        async with running(copied(checked, tmp_path / "run")) as client:
            await client.teach("yes", "yes", "yes", "yes")
            await client.release(2)
            await client.post("/v1/releases/2/promote")
            await client.until(lambda: all_of(client, 2))
            await client.teach("yes", "yes", "yes", "yes")
            assert (await client.release(3))["status"] == "canary"
            body = {
                "messages": [{"role": "user", "content": "Hi"}],
                "stream": True,
                "between_s": 0.6,
                "user": OTHERS[0],
            }
            async with client.stream("POST", "/v1/chat/completions", json=body) as stream:  # holds the other engine
                back = asyncio.create_task(client.post("/v1/releases/1/rollback"))
                await asyncio.sleep(0.3)
                later = [asyncio.create_task(asked(client, user)) for user in USERS[:6]]
                await stream.aread()
            await back
            assert {(await answer)[0] for answer in later} == {"1"}

    asyncio.run(run())


def test_a_service_without_receipts_holds_what_was_a_canary(checked: Checked, tmp_path: Path) -> None:
    service = copied(checked, tmp_path / "run")

    async def first() -> None:
        async with running(service) as client:
            await begun(client)

    async def second() -> None:
        given = service.settings.model_dump() | {"receipts": {"keep": False}, "gate": {"canary": None}}
        config = service.config.model_copy(update={"service": ServiceConfig.model_validate(given | {"feedback": {}})})
        async with running(replace(service, config=config)) as client:

            async def held() -> bool:
                return await status(client, 2) == "held"

            await client.until(held)
            await client.until(lambda: all_of(client, 1))

    asyncio.run(first())
    asyncio.run(second())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"gate": {"canary": {}}}, "gate.canary needs an engine of its own; set serving.replicas to 2 or more"),
        (
            {"gate": {"canary": {}}, "serving": {"replicas": 2}, "receipts": {"keep": False}},
            "gate.canary compares feedback, which needs receipts; set receipts.keep: true",
        ),
        (
            {"gate": {"canary": {}, "promotion": "by_hand"}, "serving": {"replicas": 2}},
            "gate.canary has no effect with gate.promotion: by_hand; remove one of them",
        ),
        (
            {"gate": {"canary": {"max_wait_s": 1e6}}, "serving": {"replicas": 2}},
            "gate.canary.max_wait_s 1e\\+06 is longer than receipts.days 7, after which feedback is removed; lower it",
        ),
    ],
)
def test_what_it_needs(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ServiceConfig.model_validate(given)
