"""skipped.jsonl: the bad rows of a source that grows, which the run does not train."""

import json
from collections.abc import Iterable
from pathlib import Path

from sdft.services.base.files import write_atomically

SKIPPED = "skipped.jsonl"


def write_skipped(run_dir: Path, problems: Iterable[str]) -> None:
    """Replace the file by these rows. problems: "name:number: what is wrong" of each."""
    rows = "".join(json.dumps({"problem": problem}) + "\n" for problem in problems)
    write_atomically(run_dir / SKIPPED, rows.encode())


def read_skipped(run_dir: Path) -> list[str]:
    """Return the problems of the skipped rows; [] if there is no file."""
    path = run_dir / SKIPPED
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["problem"] for line in lines]
