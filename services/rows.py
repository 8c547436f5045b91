"""Rows of a data file or a hub data set, each with where it stands, so that a bad one can be named."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row as it was read: `where` is "file:line" (or "name row n"), `number` counts from 1."""

    where: str
    number: int
    value: Any
    error: str | None = None  # why it could not be read at all


def jsonl_rows(path: Path) -> Iterator[Row]:
    """The lines of a JSONL file, read here and not by a library so that errors carry the line."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            yield Row(where, number, None, "is not UTF-8 text")
            continue
        if not text:
            continue
        try:
            yield Row(where, number, json.loads(text))
        except ValueError as error:
            yield Row(where, number, None, f"is not a whole JSON object ({error})")


def parquet_rows(path: Path) -> Iterator[Row]:
    """The rows of a Parquet file, through the `datasets` library."""
    import datasets

    try:
        rows = datasets.Dataset.from_parquet(str(path), cache_dir=None, keep_in_memory=True)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise UserError(f"{path}: this is not a readable Parquet file ({_first_line(error)}); write it again") from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{path} row {number}", number, row)


def hub_rows(name: str, split: str) -> Iterator[Row]:
    """The rows of a hub data set's split, through the `datasets` library."""
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, ConnectionError, RuntimeError) as error:
        raise UserError(
            f"data.train: the hub data set {name} (split {split}) could not be loaded ({_first_line(error)}); check "
            f"the name and the connection, or give a local .jsonl or .parquet file"
        ) from None
    for number, row in enumerate(rows, 1):
        yield Row(f"{name} row {number}", number, row)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0]
