"""The inbox: acknowledged records are on the disk, each once, whatever ends the process or fills the disk."""

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sdft.services.inbox.inbox import Inbox, InboxInUse, KeyUsed, NotWritten
from sdft.services.inbox.lines import InboxDamaged, Unwritable, bytes_of, records_line

ROW = {"prompt": "Turn off the light.", "demonstration": "Done."}


def rows_of(inbox: Inbox) -> list[dict[str, Any]]:
    return [record.row for record in inbox.records]


def test_records_are_on_the_disk_when_they_are_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "inbox.jsonl"

    async def run() -> None:
        inbox = Inbox(path)
        assert await inbox.add([ROW, ROW | {"id": "b"}], b"1") == [0, 1]
        assert len(path.read_bytes().splitlines()) == 1
        assert await inbox.add([ROW], b"2") == [2]
        await inbox.delete(1)
        await inbox.close()
        again = Inbox(path)
        assert again.records == inbox.records
        assert again.deleted == {1}
        with pytest.raises(KeyError):
            await again.delete(3)
        await again.close()

    asyncio.run(run())


def test_many_at_once_are_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    fsync = os.fsync

    def counted(fd: int) -> None:
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", counted)

    async def run() -> list[list[int]]:
        inbox = Inbox(tmp_path / "inbox.jsonl")
        ids = await asyncio.gather(*(inbox.add([ROW], str(i).encode()) for i in range(500)))
        await inbox.close()
        return ids

    assert asyncio.run(run()) == [[i] for i in range(500)]
    assert len(synced) <= 2


def test_the_same_key_is_one_record_and_another_body_under_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "inbox.jsonl"

    async def run() -> None:
        inbox = Inbox(path)
        both = await asyncio.gather(*(inbox.add([ROW, ROW], b"body", "k") for _ in range(2)))
        assert both == [[0, 1], [0, 1]]
        await inbox.close()
        inbox = Inbox(path)  # keys survive a restart
        assert await inbox.add([ROW, ROW], b"body", "k") == [0, 1]
        with pytest.raises(KeyUsed, match="the Idempotency-Key k came before with another body"):
            await inbox.add([ROW], b"other", "k")
        assert len(inbox.records) == 2
        await inbox.close()

    asyncio.run(run())


def test_a_line_that_was_cut_off_is_not_a_record(tmp_path: Path) -> None:
    path = tmp_path / "inbox.jsonl"
    whole = records_line(0, None, "", 1.0, bytes_of([ROW]))
    second = records_line(1, None, "", 1.0, bytes_of([ROW, ROW]))
    path.write_bytes(whole + second[:-5])  # of two records: neither is there

    async def run() -> None:
        inbox = Inbox(path)
        assert rows_of(inbox) == [ROW]
        assert await inbox.add([ROW], b"") == [1]
        await inbox.close()
        assert path.read_bytes().count(b"\n") == 2
        assert rows_of(Inbox(path)) == [ROW, ROW]

    asyncio.run(run())


def test_a_full_disk_leaves_nothing_half_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "inbox.jsonl", os.write

    def full(fd: int, data: memoryview) -> int:
        if len(data) < 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:10])

    async def run() -> None:
        inbox = Inbox(path)
        await inbox.add([ROW], b"1")
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(NotWritten, match=r"inbox\.jsonl cannot be written \(No space left on device\)"):
                await inbox.add([ROW], b"2", "k")
        assert path.read_bytes() == before
        assert await inbox.add([ROW], b"2", "k") == [1]
        await inbox.close()

    asyncio.run(run())


def test_one_process_writes(tmp_path: Path) -> None:
    path = tmp_path / "inbox.jsonl"

    async def run() -> None:
        inbox = Inbox(path)
        with pytest.raises(InboxInUse, match="in use by another service"):
            Inbox(path)
        await inbox.close()
        await Inbox(path).close()

    asyncio.run(run())


@pytest.mark.parametrize("line", ["{}", "[]", '{"kind": "records", "first": 5, "rows": []}', '{"kind": "other"}', "x"])
def test_a_line_of_another_kind_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "inbox.jsonl"
    path.write_bytes(records_line(0, None, "", 1.0, bytes_of([ROW])) + line.encode() + b"\n")
    with pytest.raises(InboxDamaged, match=r"inbox\.jsonl:2 is no line of an inbox"):
        Inbox(path)


def test_a_caller_that_goes_away_loses_no_record(tmp_path: Path) -> None:
    async def run() -> None:
        inbox = Inbox(tmp_path / "inbox.jsonl")
        call = asyncio.create_task(inbox.add([ROW], b"", "k"))
        await asyncio.sleep(0)
        call.cancel()
        assert await inbox.add([ROW], b"", "k") == [0]
        await inbox.close()

    asyncio.run(run())


@pytest.mark.parametrize("bad", ["\ud800", float("inf"), [[]]], ids=["surrogate", "infinite", "deep"])
def test_rows_that_json_cannot_hold_are_refused_alone(bad: Any, tmp_path: Path) -> None:
    if bad == [[]]:
        for _ in range(5000):
            bad = [bad]

    async def run() -> None:
        inbox = Inbox(tmp_path / "inbox.jsonl")
        good = asyncio.create_task(inbox.add([ROW], b"1"))
        with pytest.raises(Unwritable, match="cannot be kept as JSON"):
            await inbox.add([ROW | {"answer": bad}], b"2", "k")
        assert await good == [0]
        assert await inbox.add([ROW], b"3", "k") == [1]  # the key is free
        await inbox.close()

    asyncio.run(run())
