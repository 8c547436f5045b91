"""Digests of the files in a folder, by which a reader finds out that they are whole."""

from collections.abc import Mapping
from pathlib import Path

import xxhash

CHUNK = 1 << 22


def digest(path: Path) -> str:
    """Return the digest of a file: XXH3, 128 bits, hexadecimal."""
    state = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file in a folder, by name."""
    return {path.name: digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def differing(folder: Path, expected: Mapping[str, str]) -> str | None:
    """Return what is wrong with a folder that should have these files; None if nothing is."""
    for name, value in expected.items():
        try:
            found = digest(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != value:
            return f"{name} has changed"
    return None
