"""The loop of a service, with engines and training of a few lines: decisions, restarts at every state, failures."""

import asyncio
import shutil
from pathlib import Path

import pytest

from sdft.services.releases.journal import read_state
from sdft.services.serving.audit import audit_of
from sdft.services.serving.keeping import unneeded
from sdft.services.serving.start import Checked
from tests.fakes.small_service import Client, checked_service, copied, running

GOOD, WORSE = ["yes"] * 4, ["worse"] * 4


@pytest.fixture(scope="module")
def checked(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return checked_service(tmp_path_factory.mktemp("service"), tiny_model)


def fresh(checked: Checked, tmp_path: Path) -> Checked:
    """The same service with a folder of its own."""
    return copied(checked, tmp_path / "run")


def test_good_records_are_released_and_bad_ones_quarantined(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(fresh(checked, tmp_path)) as client:
            await client.teach(*GOOD)
            assert (await client.release(2))["status"] == "served"
            assert await client.ask("Hi") == "release 2: Hi"
            await client.teach(*WORSE)
            third = await client.release(3)
            assert (third["status"], third["verdict"]) == ("refused", "refuse")
            assert await client.ask("Hi") == "release 2: Hi"
            counts = (await client.got("records"))["counts"]
            assert (counts["trained"], counts["quarantined"]) == (4, 4)
            ids = (await client.post("/v1/windows/2/retry")).json()["ids"]
            assert ids == ["rec-4", "rec-5", "rec-6", "rec-7"]
            assert (await client.release(4))["status"] == "refused"

    asyncio.run(run())
    assert audit_of(tmp_path / "run").faults == []


def test_a_restart_at_every_decision_ends_the_same(checked: Checked, tmp_path: Path) -> None:
    """The service is cut off behind each decision, with the files of that time or later ones, and goes on."""
    whole = fresh(checked, tmp_path)

    async def life(client: Client) -> None:
        await client.teach(*GOOD)
        await client.release(2)
        await client.settled()
        await client.teach(*WORSE)
        await client.release(3)
        await client.settled()

    async def first() -> None:
        async with running(whole) as client:
            await life(client)

    async def again(cut: Checked) -> None:
        async with running(cut) as client:
            await client.settled()

    asyncio.run(first())
    lines = whole.folder.journal.read_bytes().splitlines(keepends=True)
    kinds = [line.split(b'"')[3].decode() for line in lines]
    window = ["opened", "candidate", "judged"]
    assert kinds == ["candidate", "served", *window, "served", *window, "refused"]
    for cut in range(2, len(lines)):
        one = copied(whole, tmp_path / f"cut-{cut}")
        one.folder.journal.write_bytes(b"".join(lines[:cut]))
        asyncio.run(again(one))
        state = read_state(one.folder.journal)
        audit = audit_of(one.folder.path)
        assert audit.faults == []
        if cut < 6:  # all eight records were in the inbox when the first window began: it has all of them
            assert audit.received == 8
            continue
        assert (state.served, state.releases[3].status) == (2, "refused"), cut
        assert (audit.counts["trained"], audit.counts["quarantined"]) == (4, 4), cut


def test_a_window_that_fails_by_its_records(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(fresh(checked, tmp_path)) as client:
            ids = await client.teach("broken", "yes", "yes", "yes")
            await client.until(lambda: quarantined(client, ids[0]))
            assert "the rows are broken" in (await client.got(f"records/{ids[0]}"))["reason"]
            await client.settled()

    async def quarantined(client: Client, record: str) -> bool:
        return bool((await client.got(f"records/{record}"))["state"] == "quarantined")

    asyncio.run(run())


def test_a_release_that_the_engine_refuses_is_held(checked: Checked, tmp_path: Path) -> None:
    async def run() -> None:
        async with running(fresh(checked, tmp_path)) as client:
            await client.teach("refused", "yes", "yes", "yes")
            release = await client.release(2)
            assert release["status"] == "held"
            assert "log-probs differ" in release["reason"]
            await client.until(lambda: answers(client))
            assert await client.ask("Hi") == "release 1: Hi"
            refused = await client.post("/v1/releases/2/promote")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_changed")
            await client.teach(*GOOD)
            await client.settled()
            assert (await client.got("status"))["counts"]["waiting"] == 4  # no window while one is held
            assert (await client.post("/v1/releases/2/rollback")).json()["id"] == 1
            assert (await client.release(3))["status"] == "served"

    async def answers(client: Client) -> bool:
        return (await client.get("/readyz")).status_code == 200

    asyncio.run(run())


def test_a_rollback_ends_the_open_window(checked: Checked, tmp_path: Path) -> None:
    """Its records wait again, and are trained from the release that is served then."""

    async def run() -> None:
        async with running(fresh(checked, tmp_path)) as client:
            await client.teach(*GOOD)
            await client.release(2)
            await client.settled()
            await client.teach("yes", "yes", "yes", "yes")
            await client.until(lambda: trains(client))
            await client.post("/v1/releases/2/rollback")
            served = await client.release(3)
            assert served["parent"] == 1
            assert (await client.got("records"))["counts"]["quarantined"] == 4

    async def trains(client: Client) -> bool:
        return (await client.got("status"))["window"] is not None

    asyncio.run(run())
    assert audit_of(tmp_path / "run").faults == []


def test_halves_find_the_bad_record(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, gate={"split_up_to": 8})

    async def run() -> None:
        async with running(service) as client:
            ids = await client.teach("yes", "yes", "worse", "yes")
            await client.until(lambda: found(client, ids))
            assert [(await client.got(f"records/{i}"))["state"] for i in ids] == [
                "trained",
                "trained",
                "quarantined",
                "trained",
            ]

    async def found(client: Client, ids: list[str]) -> bool:
        counts = (await client.got("records"))["counts"]
        return bool((counts["trained"], counts["quarantined"]) == (3, 1))

    asyncio.run(run())
    assert audit_of(service.folder.path).faults == []


def test_a_window_begins_when_a_record_has_waited(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, window={"min_records": 100, "max_wait_s": 0.5})

    async def run() -> None:
        async with running(service) as client:
            await client.teach("yes")
            assert (await client.release(2))["records"] == 1

    asyncio.run(run())


def test_old_weights_go(checked: Checked, tmp_path: Path) -> None:
    service = fresh(checked, tmp_path)

    async def run() -> None:
        async with running(service) as client:
            for number in range(2, 7):
                await client.teach(*GOOD)
                await client.release(number)
                await client.settled()
            await client.post("/v1/releases/2/pin")

    asyncio.run(run())
    state = read_state(service.folder.journal)
    removed = [int(path.name) for path in unneeded(service.folder, state, keep=2) if path.parent.name == "releases"]
    assert removed == [3, 4]  # the newest two, the pinned one and the first stay
    assert state.releases[2].pinned
    shutil.rmtree(service.folder.path)
