"""Sources that grow: lines of a log, bad rows, waits in simulated time, and the schedule over them."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import StageSchedule
from sdft.services.data.sources.base import PromptSource
from sdft.services.data.sources.growing import GrowingSource
from sdft.services.data.sources.open import open_source
from simulation import virtual_time
from tests.fakes.table_log import add

ALL = 10**6
CLOSE = {"closed": True}
REQUIRED = ("prompt", "demonstration")


def row(i: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Say {i}.", "demonstration": f"{i}"} | more


def build(records: Sequence[Record]) -> list[PromptPair]:
    """Take the characters of a record for its tokens; more than 20 are too long."""
    pairs = []
    for record in records:
        text = f"{record.messages[-1]['content']}{record.demonstration}"
        if len(text) > 20:
            raise UserError(f"{record.where}: too long\nshorten it")
        pairs.append(PromptPair.of(list(text.encode()), None))
    return pairs


def opened(path: Path, source: str = "log") -> GrowingSource:
    return open_source(DataConfig(train=str(path), source=source), path.parent, REQUIRED, build)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.jsonl"
    path.touch()
    return path


def append(path: Path, *rows: dict[str, Any] | bytes) -> None:
    with path.open("ab") as file:
        for one in rows:
            file.write(one if isinstance(one, bytes) else json.dumps(one).encode() + b"\n")


def texts(source: PromptSource) -> list[Any]:
    source.read(ALL)
    return [record.demonstration for record in source.records]


def test_a_line_is_read_once_its_newline_is_ready(log: Path) -> None:
    source, line = opened(log), json.dumps(row(1)).encode()
    append(log, row(0), line[:9])
    assert texts(source) == ["0"]
    append(log, line[9:])
    assert texts(source) == ["0"]
    append(log, b"\n", b"\n  \n", row(2))
    assert texts(source) == ["0", "1", "2"]
    assert [record.where for record in source.records] == [f"{log}:{n}" for n in (1, 2, 5)]
    assert source.skipped == []
    assert not source.closed


def test_the_lines_of_a_log_have_the_format_of_the_data(log: Path) -> None:
    data = DataConfig(train=str(log), source="log", format="sharegpt")
    source = open_source(data, log.parent, REQUIRED, build)
    said = [{"from": "human", "value": "Say 0."}, {"from": "gpt", "value": "0"}]
    append(log, {"conversations": said}, {"conversations": said[:1]}, row(1))
    assert texts(source) == ["0"]
    assert [reason.partition(" (")[0] for reason in source.skipped] == [
        f"{log}:2: demonstration is missing",
        f"{log}:3: prompt is not read in data.format: sharegpt, which has conversations; remove the column, or set "
        f"data.format: messages",
    ]


def test_a_bad_line_is_skipped_with_its_reason_and_a_corrected_one_may_follow(log: Path) -> None:
    source = opened(log)
    append(
        log, row(0, id="a"), b"{\n", {"prompt": "?"}, row(1, id="b", demonstration="x" * 30), row(2, id="a"), b"\xff\n"
    )
    append(log, row(1, id="b"))
    assert texts(source) == ["0", "1"]
    reasons = (
        "the JSON ends too early",
        "demonstration is missing",
        "too long; shorten it",
        'id "a" is already',
        "UTF-8",
    )
    assert len(source.skipped) == len(reasons)
    for line, (reason, said) in enumerate(zip(reasons, source.skipped, strict=True), start=2):
        assert said.startswith(f"{log}:{line}: ")
        assert reason in said
    assert source.trouble == f"rows skipped: 5, the last one {source.skipped[-1]}"


def test_a_closed_log_is_read_no_further(log: Path) -> None:
    append(log, b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\n", CLOSE, row(1), b"{\n")
    source = opened(log)
    assert source.closed
    assert texts(source) == ["0"]
    assert source.skipped == []


def test_as_many_records_are_read_as_are_needed(log: Path) -> None:
    """The others are tokenized when they are drawn."""
    source = opened(log)
    append(log, *(row(i) for i in range(9)))
    for count in (2, 1, 5):
        source.read(count)
        assert source.known == max(2, count)
    assert len(texts(source)) == 9


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((b"{\n", b"[]\n"), "log.jsonl:2: .*\n.*: no row is good; correct the section data, or the rows"),
        ((CLOSE,), "log.jsonl: it is closed and has no record; add records before the row that closes it"),
    ],
)
def test_a_log_that_can_give_nothing_is_refused_at_the_start(log: Path, lines: tuple[Any, ...], expected: str) -> None:
    append(log, *lines)
    with pytest.raises(UserError, match=expected):
        opened(log)


def test_a_log_that_cannot_be_read_is_refused_at_the_start_and_looked_at_again_later(log: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read .*; check the path and its permissions"):
        opened(log.with_name("gone.jsonl"))
    append(log, row(0))
    source = opened(log)
    aside = log.rename(log.with_name("aside"))
    assert texts(source) == ["0"]
    assert "cannot be read" in source.trouble
    append(aside, row(1))
    aside.rename(log)
    assert texts(source) == ["0", "1"]
    assert source.trouble == ""


def test_a_log_that_became_shorter_is_refused(log: Path) -> None:
    append(log, row(0), row(1))
    source = opened(log)
    log.write_bytes(b"")
    with pytest.raises(UserError, match="the log has become shorter than line 2, which was read already; restore"):
        source.read(ALL)


def test_a_source_of_a_users_own_is_checked_as_a_log_is(tmp_path: Path) -> None:
    path = tmp_path / "records.sqlite"
    add(path, [row(0), {"prompt": "?"}, row(1), CLOSE, row(2)])
    source = opened(path, "tests.fakes.table_log:TableLog")
    assert texts(source) == ["0", "1"]
    assert source.closed
    assert [said.split(": ")[0] for said in source.skipped] == [f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tests.fakes.table_log:Table", "data.source: tests.fakes.table_log:Table cannot be imported"),
        ("pathlib:Path", "data.source: pathlib:Path is not a subclass of sdft.services.data.sources.growing.Growing"),
    ],
)
def test_another_class_is_no_source(tmp_path: Path, name: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        opened(tmp_path / "x", name)


class Timed(GrowingSource):
    """One record every ten seconds of the loop's time, and `last` of them."""

    last = 8

    def rows(self, after: int) -> Iterator[tuple[int, dict[str, Any]]]:
        come = int(asyncio.get_running_loop().time() // 10)
        for number in range(after + 1, min(come, self.last) + 1):
            yield number, row(number)
        if come > self.last:
            yield self.last + 1, CLOSE


def timed(work: Callable[[GrowingSource], Any]) -> Any:
    """Run `work` on a Timed source in simulated time."""

    async def run() -> Any:
        return await work(opened(Path("timed"), f"{__name__}:Timed"))

    return virtual_time.run(run())


def test_a_wait_ends_when_the_records_are_there_or_the_source_is_closed() -> None:
    async def work(source: GrowingSource) -> list[float]:
        times = []
        for count in (3, 2, 20):
            await source.wait(count, 1000)
            times.append(asyncio.get_running_loop().time())
        assert source.closed
        assert source.known == 8
        return times

    assert timed(work) == [30, 30, 90]


def test_a_wait_that_is_too_long_names_the_record_and_what_came() -> None:
    async def work(source: GrowingSource) -> str:
        with pytest.raises(TimeoutError) as error:
            await source.wait(6, 25)
        return str(error.value)

    assert timed(work) == (
        "waited 25 s for record 6 of timed (0 known); 2 arrived meanwhile; add records, or raise "
        "data.record_timeout_s, and run the same command again: it resumes from the last checkpoint"
    )


def test_a_growing_source_is_drawn_in_order_in_whole_batches_and_a_last_short_one(log: Path) -> None:
    append(log, *(row(i) for i in range(5)))
    source = opened(log)
    schedule = StageSchedule(source, batch_size=4, generations=2, seed=0, limit=None, before=3)
    assert schedule.last is None
    assert not schedule.end_is_known
    assert [schedule.is_ready(step) for step in (4, 5)] == [True, False]
    assert Counter((s.epoch, s.record) for s in schedule.batch(4)) == {(0, i): 2 for i in range(4)}
    append(log, row(5), CLOSE)
    assert [schedule.is_ready(step) for step in (5, 6)] == [True, False]
    assert schedule.last == 5
    assert schedule.end_is_known
    assert [s.record for s in schedule.batch(5)] == [4, 4, 5, 5]
    assert [schedule.issued_through(step) for step in (3, 4, 5)] == [{}, {(0, 0): 8}, {(0, 0): 12}]
    assert [(d.index, d.where) for d in schedule.drawn(5)] == [(4, f"{log}:5"), (5, f"{log}:6")]


def test_steps_bound_a_growing_source(log: Path) -> None:
    append(log, *(row(i) for i in range(5)))
    source = opened(log)
    schedule = StageSchedule(source, batch_size=4, generations=1, seed=0, limit=8)
    assert (schedule.last, schedule.end_is_known, schedule.is_ready(2)) == (2, False, False)
    append(log, *(row(i) for i in range(9)))
    assert [schedule.is_ready(step) for step in (2, 3)] == [True, False]
    assert schedule.end_is_known
    assert schedule.issued_through(2) == {(0, 0): 8}
