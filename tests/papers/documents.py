"""Indented blocks of the documents, for tests that do what they say."""

import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = (
    README,
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "deploy" / "README.md",
    ROOT / "examples" / "README.md",
    ROOT / "examples" / "agent" / "README.md",
)


def blocks(document: Path = README) -> list[str]:
    """Return the indented blocks in order, without their indentation."""
    found: list[str] = []
    inside = False
    for line in document.read_text().splitlines():
        if line.startswith("    "):
            if inside:
                found[-1] += f"\n{line[4:]}"
            else:
                found.append(line[4:])
        inside = line.startswith("    ")
    return found


def block(beginning: str, document: Path = README) -> str:
    """Return the one block that begins so."""
    (found,) = [b for b in blocks(document) if b.startswith(beginning)]
    return found + "\n"


def commands(program: str, document: Path = README) -> list[list[str]]:
    """Return the commands of a program (sdft, ray, make) in the blocks, as argument lists without comments."""
    lines = [line for b in blocks(document) for line in b.replace("\\\n", "").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
