"""Read rows of a JSONL file, a Parquet file or a hub data set, numbered from 1; an unreadable row is a BadRow."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sdft.services.base.errors import UserError, first_line


class BadRow(str):
    """The reason why a row cannot be read."""

    __slots__ = ()


NumberedRow = tuple[int, dict[str, Any] | BadRow]
BOM = b"\xef\xbb\xbf"  # some editors begin a UTF-8 file with it


def jsonl_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the objects of a JSONL file with their line numbers; blank lines are skipped."""
    with _opened(path) as file:
        # Lines end at \n only: str.splitlines would also cut at characters that JSON allows inside a string.
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                yield number, parse_line(text)


def parquet_rows(path: Path) -> Iterator[NumberedRow]:
    """Yield the rows of one Parquet file, with one batch in memory at a time."""
    import pyarrow.parquet

    with _opened(path) as file:
        try:
            # Pass the open file, not its name: libraries may interpret a name as a pattern, folder or host.
            parquet = pyarrow.parquet.ParquetFile(file)
            names = parquet.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise UserError(f"{path}: two columns are called {twice}; rename or remove one")
            batches = (row for batch in parquet.iter_batches() for row in batch.to_pylist())
            yield from _numbered(batches)
        except (pyarrow.ArrowException, ArithmeticError, OSError, ValueError) as e:
            raise UserError(f"{path}: not a readable Parquet file: {first_line(e)}; write the file again") from None


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; check its permissions") from None


def hub_rows(name: str, split: str, hint: str) -> Iterator[NumberedRow]:
    """Yield the rows of a split of a hub data set. `hint` is added to the errors that suggest a local file."""
    import datasets

    local = f"or put the rows into a local .jsonl file and name that file{hint}"
    if Path(name).exists():  # load_dataset would load it as a data set folder
        raise UserError(
            f"data.train: {name} is not a file in the configuration's folder, but {Path(name).absolute()} exists; give "
            f"the path of a .jsonl or .parquet file"
        )
    try:
        rows = datasets.load_dataset(name, split=split)
    except datasets.exceptions.DatasetNotFoundError as e:
        raise UserError(f"data.train: {name} is not on the hub: {first_line(e)}; check the name, {local}") from None
    except (ConnectionError, TimeoutError) as e:
        reason = first_line(e)
        raise UserError(
            f"data.train: {name} is not a local file, and the hub cannot be reached: {reason}; connect to the hub, "
            f"{local}"
        ) from None
    except PermissionError as e:
        raise UserError(
            f"data.train: the hub data set {name} cannot be cached: {first_line(e)}; set HF_HOME to a writable folder, "
            f"{local}"
        ) from None
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as e:
        reason = first_line(e)
        raise UserError(
            f"data.train: split {split} of the hub data set {name} cannot be loaded: {reason}; set data.split to one "
            f"of its splits, {local}"
        ) from None
    yield from _numbered(rows)


def renamed(rows: Iterable[NumberedRow], columns: Mapping[Any, str]) -> Iterator[NumberedRow]:
    """Rename columns. A demonstration given as a list of lines is joined. columns: {our name: name in the file}."""
    for number, row in rows:
        if isinstance(row, BadRow):
            yield number, row
            continue
        missing = next((in_file for in_file in columns.values() if in_file not in row), None)
        if missing is not None:
            yield number, BadRow(f"the setting columns names {missing}, but the row has {', '.join(row)}")
            continue
        renamed_row = {name: value for name, value in row.items() if name not in columns.values()}
        renamed_row |= {name: row[in_file] for name, in_file in columns.items()}
        lines = renamed_row.get("demonstration")
        if isinstance(lines, list) and lines and all(isinstance(line, str) for line in lines):
            renamed_row["demonstration"] = "\n".join(lines)
        yield number, renamed_row


def _numbered(rows: Iterable[dict[str, Any]]) -> Iterator[NumberedRow]:
    """Number rows of Arrow and drop null members: Arrow gives every object of a column the members of all others."""
    for number, row in enumerate(rows, start=1):
        yield number, {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    """Return the value with null members of objects removed."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parse_line(line: bytes) -> dict[str, Any] | BadRow:
    """Return the object in a line of a JSONL file, which is not blank."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        return BadRow(f"byte {e.start + 1} is not UTF-8; save the file as UTF-8")
    try:
        row = parse_json(text)
    except json.JSONDecodeError as e:
        if e.pos >= len(text.rstrip()) or e.msg.startswith("Unterminated string"):
            return BadRow("the JSON ends too early; the line is cut off, or the object spans several lines")
        return BadRow(f"not valid JSON: {e.msg} at character {e.pos + 1}")
    except (ValueError, RecursionError) as e:
        return BadRow(f"not valid JSON: {e}")
    if not isinstance(row, dict):
        return BadRow(f"the row is {json_kind(row)}, not an object; give one JSON object a line")
    return row


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. ValueError or RecursionError if it is not one, has a key twice or a NaN."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f'the key "{next(k for k in keys if keys.count(k) > 1)}" is given twice')
    return row


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def json_kind(value: Any) -> str:
    """Name the kind of a value, for an error message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return type(value).__name__  # Parquet: bytes, dates
