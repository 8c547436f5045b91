"""Open the source that grows which a configuration names: a log, or a class of a user's own."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdft.actors.shared.own_code import NotImportable, own_class
from sdft.services.base.errors import UserError
from sdft.services.base.files import resolve_path
from sdft.services.config.data import DataConfig
from sdft.services.data.demonstrations import MAX_REPORTED, Record, RowChecker
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sources.growing import GrowingSource, RecordMaker
from sdft.services.data.sources.log import LogSource


def open_source(
    data: DataConfig,
    base: Path,
    required: tuple[str, ...],
    build: Callable[[Sequence[Record]], list[PromptPair]],
    count: int = sys.maxsize,
    check_answer: Callable[[Any], str | None] = lambda answer: None,
    conversations: bool = False,
    teachers: Sequence[str] = (),
) -> GrowingSource:
    """Open the source that data.train and data.source name, and read what it has, up to `count` records.

    required: columns that a row needs. check_answer() returns the problem of an answer. build() raises UserError for
    records that are too long. conversations, teachers: as for a RowChecker. Raises UserError if the source cannot be
    read, or has rows and none of them is good: that is a mistake in the settings.
    """
    path = resolve_path(base, data.train)
    name = str(path) if path.exists() else data.train
    maker = RecordMaker(
        RowChecker(name, required, check_answer, data.format, conversations, teachers),
        data.columns,
        lambda record: build([record])[0],
    )
    source = _class(data)(name, maker)
    source.read(count)
    if source.skipped and not source.records:
        more = len(source.skipped) - MAX_REPORTED
        shown = source.skipped[:MAX_REPORTED] + ([f"… and {more} more"] if more > 0 else [])
        raise UserError("\n".join([*shown, f"{name}: no row is good; correct the section data, or the rows"]))
    if source.closed and not source.records:
        raise UserError(f"{name}: it is closed and has no record; add records before the row that closes it")
    if source.unreadable:
        raise UserError(f"{source.unreadable}; check the path and its permissions")
    return source


def _class(data: DataConfig) -> type[GrowingSource]:
    if data.source == "log":
        return LogSource
    try:
        return own_class(data.source, GrowingSource)
    except NotImportable as error:
        raise UserError(f"data.source: {error}") from None
