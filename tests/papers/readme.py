"""Reads the README's indented blocks, for tests that run what it says."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks() -> list[str]:
    """Return the indented blocks in order, without their indentation."""
    found: list[str] = []
    inside = False
    for line in (ROOT / "README.md").read_text().splitlines():
        if line.startswith("    "):
            if inside:
                found[-1] += f"\n{line[4:]}"
            else:
                found.append(line[4:])
        inside = line.startswith("    ")
    return found


def commands(program: str) -> list[list[str]]:
    """Return the README's commands of a program (sdft, ray, make) as argument lists, without comments."""
    lines = [line for block in blocks() for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
