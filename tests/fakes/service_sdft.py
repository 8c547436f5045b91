"""The command `sdft` of a few lines, for tests of a service's loop: a run without a model.

    python service_sdft.py train window.yaml --run-dir RUN       python service_sdft.py export RUN --out DIR

The records decide what becomes of the candidate: one with the demonstration "worse" makes every answer wrong, "refused"
makes a release that engines refuse, and "broken" ends the run with exit code 2.
"""

import json
import shutil
import sys
from pathlib import Path

import yaml

from sdft.actors.shared.types import SampleId
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import Reply, StepMetrics, json_line

SET, QUESTIONS = "own", 40


def train(config: Path, run: Path) -> int:
    given = yaml.safe_load(config.read_text())
    rows = [json.loads(line) for line in Path(given["data"]["train"]).read_text().splitlines()]
    said = {row.get("demonstration", "") for row in rows}
    if "broken" in said:
        print("sdft: the rows are broken", file=sys.stderr)
        return 2
    run.mkdir(parents=True, exist_ok=True)
    (run / "ledger.sqlite").unlink(missing_ok=True)
    ledger = Ledger(run / "ledger.sqlite")
    samples = [SampleId(0, 0, i, 0) for i in range(len(rows))]
    ledger.issue(samples, 1)
    for state in ("sampled", "scored", "trained"):
        ledger.advance(samples, state)
    ledger.audit({(0, 0): len(samples)})
    ledger.close()
    replies = [
        Reply(step, SET, f"q{i}", "?", "!", f"answer {i}", step == 0 or "worse" not in said, 3, False)
        for step in (0, 1)
        for i in range(QUESTIONS)
    ]
    (run / "samples.jsonl").write_bytes(b"".join(map(json_line, replies)))
    figures = dict.fromkeys((name for name in StepMetrics.__dataclass_fields__), 0) | {"step": 1, "direction": "nll"}
    (run / "metrics.jsonl").write_text(json.dumps(figures) + "\n")
    (run / "said.json").write_text(json.dumps(sorted(said)))
    return 0


def export(run: Path, out: Path) -> int:
    shutil.copytree(run, out)
    if "refused" in json.loads((run / "said.json").read_text()):
        (out / "refused").touch()
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    sys.exit((train if words[0] == "train" else export)(Path(words[1]), Path(words[3])))
