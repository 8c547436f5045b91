"""`make continual`: three skills in sequence by several methods, each with its own learning rates and seeds; compared.

    grid ─► `sdft train continual.yaml --set ...`, one run after the other ─► their matrices ─► a table and a plot

Runs are kept in runs/continual/METHOD-LR-SEED. Stopped and started again, it goes on where it was: a finished run is
not repeated, an unfinished one resumes. Without `--full`, the whole grid, it has one seed and few rates.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.continual import Estimate, Matrix, over_runs, read_matrix

HERE = Path(__file__).parent
METHODS = ("sdft", "off_policy", "sft", "dft", "reinvoke")  # the last is SFT, with stages of its own
SMALL = [("sdft", 5e-5), ("sft", 1e-5), ("sft", 5e-5), ("dft", 5e-5), ("reinvoke", 5e-5)]
RATES, SEEDS = (1e-5, 2e-5, 5e-5, 1e-4), (0, 1, 2)
COLOURS = {"sdft": "#0072b2", "off_policy": "#56b4e9", "sft": "#d55e00", "dft": "#e69f00", "reinvoke": "#009e73"}
SKILLS, KEPT = "average accuracy", "retention general"


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    method: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.lr:.0e}-{self.seed}".replace("e-0", "e-")

    def command(self, run_dir: Path) -> list[str]:
        settings: dict[str, Any] = {"learner.optimizer.lr": self.lr, "seed": self.seed}
        config = HERE / "reinvoke.yaml"
        if self.method != "reinvoke":
            config = HERE / "continual.yaml"
            settings["method"] = self.method
        words = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        train = [sys.executable, "-m", "services.cli", "train", str(config), "--run-dir", str(run_dir)]
        return train + words


def grid(full: bool) -> Iterator[Run]:
    points = [(method, lr) for method in METHODS for lr in RATES] if full else SMALL
    for seed in SEEDS if full else SEEDS[:1]:
        for method, lr in points:
            yield Run(method, lr, seed)


def finished(run_dir: Path) -> bool:
    path = run_dir / "run.json"
    return path.exists() and json.loads(path.read_text())["state"] == "finished"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--full", action="store_true", help="every method, four rates, three seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"), help="where the runs are kept")
    given = parser.parse_args()
    runs = list(grid(given.full))
    for number, run in enumerate(runs, 1):
        run_dir = given.runs / run.name
        if finished(run_dir):
            continue
        print(f"run {number} of {len(runs)}: {run_dir}", flush=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        with (run_dir / "output.log").open("ab") as log:
            subprocess.run(run.command(run_dir), stdout=log, stderr=log, check=True)
    matrices: dict[tuple[str, float], list[Matrix]] = defaultdict(list)
    for run in runs:
        matrices[run.method, run.lr].append(read_matrix(given.runs / run.name))
    compared = {point: over_runs([m.metrics() for m in found]) for point, found in matrices.items()}
    print(table(compared, matrices))
    plot(compared, given.runs / "pareto.svg")
    print(f"plot: {given.runs / 'pareto.svg'}; one run's matrix: sdft matrix {given.runs}/NAME")


def table(compared: dict[tuple[str, float], dict[str, Estimate]], matrices: dict[tuple[str, float], list[Any]]) -> str:
    """In Markdown: a row for each method and rate, shares in percent with half of the 95 % interval over seeds."""
    names = list(dict.fromkeys(name for figures in compared.values() for name in figures))
    lines = ["| method | lr | seeds | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for (method, lr), figures in compared.items():
        cells = [text(figures[name]) if name in figures else "–" for name in names]
        lines.append(f"| {method} | {lr:g} | {len(matrices[method, lr])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(e: Estimate) -> str:
    half = "" if e.half != e.half else f" ± {100 * e.half:.1f}"
    return f"{100 * e.mean:.1f}{half}"


def plot(compared: dict[tuple[str, float], dict[str, Estimate]], path: Path) -> None:
    """What was learnt against what was kept, a line of rates for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for method in dict.fromkeys(method for method, _ in compared):
        points = sorted((lr, figures) for (m, lr), figures in compared.items() if m == method)
        kept = [100 * figures[KEPT].mean for _, figures in points]
        learnt = [100 * figures[SKILLS].mean for _, figures in points]
        axes.plot(kept, learnt, "o-", color=COLOURS[method], label=method)
        for (lr, _), x, y in zip(points, kept, learnt, strict=True):
            axes.annotate(f"{lr:g}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, color="#6a737d")
    axes.set_xlabel("general questions kept, % (before training: 100)")
    axes.set_ylabel("mean accuracy on all three skills at the end, %")
    axes.grid(color="#eceff3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
