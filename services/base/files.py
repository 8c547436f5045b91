"""Files: finding those in a configuration, with errors that suggest the nearest name; atomic writes; disk errors."""

import difflib
import errno
import os
import re
import sqlite3
from contextlib import suppress
from pathlib import Path

from sdft.services.base.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".parquet")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
SQLITE_FILE = (
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_BUSY,
)
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_data_file(value: str) -> bool:
    """Return whether `value` has the suffix of a data file (else it may be a hub name)."""
    return value.endswith(DATA_SUFFIXES)


def is_hub_name(value: str) -> bool:
    """Return whether `value` has the form `name` or `owner/name` of a Hugging Face hub id."""
    return _HUB_NAME.match(value) is not None


def near_names(wanted: str, folder: Path) -> list[str]:
    """Return up to three names in `folder` that resemble `wanted`, the nearest first."""
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError:
        return []
    return difflib.get_close_matches(wanted, names, n=3, cutoff=0.6)


def resolve_path(base: Path, value: str) -> Path:
    """Return the path `value`, relative to the folder `base` of the config file unless it is absolute."""
    path = Path(value).expanduser()
    return path if path.is_absolute() else (base / path)


def existing_file(key: str, value: str, base: Path) -> Path:
    """Return the file of setting `key`, relative to the folder `base`. Raises UserError if it does not exist."""
    path = resolve_path(base, value)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{key}: {path} is a folder; name a file")
    # The folder itself may be the mistyped part of the path.
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    folder = f", nor does its folder {missing}" if missing != path else ""
    near = near_names(missing.name, missing.parent)
    mend = f"did you mean {near[0]}?" if near else f"paths are relative to {base.resolve()}"
    raise UserError(f"{key}: {path} does not exist{folder}; {mend}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises UserError if it cannot be read or decoded."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = near_names(path.name, path.parent)
        mend = f"did you mean {path.with_name(near[0])}?" if near else "check the path"
        raise UserError(f"{path}: no such file; {mend}") from None
    except IsADirectoryError:
        raise UserError(f"{path}: this is a folder; name a file in it") from None
    except UnicodeDecodeError as e:
        line = e.object[: e.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: this line is not UTF-8 text; save the file as UTF-8") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}; check its permissions") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically: a reader, or a killed run, finds the old file or the new one."""
    part = path.with_name(part_name(path))
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()  # a part of a file holds room on a full disk
        raise


def part_name(path: Path) -> str:
    """Return the name that a new file or folder has beside `path` until it is whole."""
    return f".{path.name}.part"


def check_output(path: Path, option: str = "") -> None:
    """Raise UserError unless a new file or folder can be made at `path`, below the first of its parents that exists.

    option: the option that gives the path, as the message begins with it. For a check before long work: permissions
    alone do not tell, because a file system may be read-only or refuse the name.
    """
    try:
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        trial = parent / part_name(path)
        trial.open("xb").close()
        trial.unlink()
    except FileExistsError:
        pass  # left by a killed command, and replaced
    except OSError as error:
        raise UserError(
            f"{option}{' ' if option else ''}{path}: nothing can be written there ({error.strerror}); mend that, or "
            f"name another place"
        ) from None


def check_output_file(path: Path, option: str) -> None:
    """Raise UserError unless write_atomically can write the file of `option`. Its folder must exist."""
    try:
        if not path.absolute().parent.is_dir():
            raise UserError(f"{option} {path}: its folder does not exist; make it first")
        if path.is_dir():
            raise UserError(f"{option} {path}: this is a folder; name a file")
        if path.exists() and not path.is_file():
            raise UserError(f"{option} {path}: this is a device or pipe, which the file would replace; name a file")
    except OSError as error:
        raise UserError(f"{option} {path}: no file can be there ({error.strerror}); name another") from None
    check_output(path, option)


def takes_no_more(error: BaseException) -> bool:
    """Return whether the error comes from a disk that is full, over quota, read-only or broken."""
    error = _cause(error)
    if isinstance(error, sqlite3.OperationalError):
        return _sqlite_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
    return isinstance(error, OSError) and error.errno in DISK


def of_a_file(error: BaseException) -> bool:
    """Return whether the error means that a file could not be made, read or written, for any reason.

    A timeout (TimeoutError) and a lost peer (ConnectionError) are OSErrors too, but not errors of a file. An error of a
    file has the operating system's error number.
    """
    error = _cause(error)
    if isinstance(error, sqlite3.OperationalError):
        return _sqlite_code(error) in SQLITE_FILE
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError)


def _cause(error: BaseException) -> BaseException:
    """Return the exception that an actor raised: Ray's wrapper has the same class, but not the error number."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _sqlite_code(error: sqlite3.OperationalError) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # without the extended code
