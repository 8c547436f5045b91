"""Step time with rollouts made ahead (max_staleness 1) against strict mode, on the tool example as shipped.

    python -m benchmarks.ahead

All processes share the machine's cores, so the gain is the time in which a phase leaves cores idle. Each mode runs
twice, alternating, without evaluation. Figures are means over the steps after the third, without the last step, during
which nothing is sampled. Medians would mislead where short and long steps alternate: they show only one of the two.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import report
from sdft.services.config.dtype import native_dtype
from sdft.services.records.rows import read_jsonl

TOOLS = Path(__file__).parent.parent / "examples" / "tools" / "tools.yaml"
STEPS, WARM, ROUNDS = 14, 3, 2
FIELDS = ("time_step_s", "time_rollout_s", "time_score_s", "time_learn_s", "time_sync_s", "time_wait_s")


def steps(run_dir: Path, staleness: int) -> list[dict[str, float]]:
    settings = {"training.steps": STEPS, "training.max_staleness": staleness, "evaluation.sets": []}
    overrides = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    command = [sys.executable, "-m", "sdft.services.cli", "train", str(TOOLS), "--run-dir", str(run_dir), *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=1800)
    return list(read_jsonl(run_dir / "metrics.jsonl"))[WARM:-1]


def main() -> None:
    measured: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(ROUNDS):
            for staleness, found in measured.items():
                found += steps(Path(scratch) / f"{staleness}-{i}", staleness)
    strict = statistics.mean(row["time_step_s"] for row in measured[0])
    rows = []
    for staleness, found in measured.items():
        times = {f"{n.split('_')[1]} s": statistics.mean(row[n] for row in found) for n in FIELDS}
        mean = statistics.mean(row["staleness_mean"] for row in found)
        rows.append({"max_staleness": staleness, **times, "of strict": times["step s"] / strict, "staleness": mean})
    report("ahead", f"Rollouts made ahead of the learner, tool example, {native_dtype('cpu')}", rows)


if __name__ == "__main__":
    main()
