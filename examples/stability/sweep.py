"""Long runs with different teachers: which drift, which detector warns first, and how long before accuracy falls.

    variants ─► `sdft train stability.yaml --set ...` for each seed ─► eval.jsonl: when a set falls for good
                                                                   └► metrics.jsonl: when each detector warns first

    python -m examples.stability.sweep [--only VARIANT ...] [--seeds N] [--jobs N] [--set KEY=VALUE]

Runs are in runs/stability/VARIANT-SEED. When it is started again, finished runs are not repeated and unfinished ones
resume. A run of 400 steps takes about 40 minutes on two cores; all of them are 8 variants with three seeds. Without an
option the variants `ema-0.02` and `frozen` run with one seed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.continual.sweep import SEEDS, Variant, run_all
from sdft.services.config.detectors import DetectorsConfig
from sdft.services.records.rows import STUDENT_ACCURACY, EvalResult, StepMetrics, read_rows
from sdft.services.training.detectors import Detectors

CONFIG = Path(__file__).parent / "stability.yaml"
FALL = 0.1  # of an accuracy, below its best before


def variant(name: str, **settings: object) -> Variant:
    return Variant(name, CONFIG, {key.replace("__", "."): value for key, value in settings.items()})


VARIANTS = {
    v.name: v
    for v in (
        *(variant(f"ema-{alpha:g}", teacher__alpha=alpha) for alpha in (0.005, 0.02, 0.1)),
        variant("ema-0.02-skip-3", method__skip_first=3),
        variant("frozen", teacher__weights="frozen"),
        variant("frozen-skip-3", teacher__weights="frozen", method__skip_first=3),
        variant("gated", teacher__weights="gated", teacher__refresh_every=40),
        variant("live", teacher__weights="live"),
    )
}
SMALL = ("ema-0.02", "frozen")


@dataclass(frozen=True)
class Found:
    """What one run shows."""

    last: dict[str, float]  # accuracy of each set at the end
    best: dict[str, float]
    fell: tuple[int, str] | None  # step from which a set stays below its best before, and the set; None: none does
    warned: dict[str, int]  # step of each detector's first warning

    @property
    def first(self) -> tuple[int, str] | None:
        """The step of the first warning, and its detector."""
        return min(((step, name) for name, step in self.warned.items()), default=None)


def found_in(results: Sequence[EvalResult], steps: Sequence[StepMetrics]) -> Found:
    """Return what a run shows. results: accuracies of its sets. steps: in order."""
    of_set: dict[str, list[EvalResult]] = {}
    for result in sorted((r for r in results if r.metric == STUDENT_ACCURACY), key=lambda r: r.step):
        of_set.setdefault(result.task, []).append(result)
    falls = [(step, name) for name, rows in of_set.items() if (step := fall_of(rows)) is not None]
    detectors, warned = Detectors(DetectorsConfig(), ()), dict[str, int]()
    for row in steps:
        for drift in detectors.judge(row):
            warned.setdefault(drift.detector.name, row.step)
    return Found(
        last={name: rows[-1].value for name, rows in of_set.items()},
        best={name: max(r.value for r in rows) for name, rows in of_set.items()},
        fell=min(falls, default=None),
        warned=warned,
    )


def fall_of(rows: Sequence[EvalResult]) -> int | None:
    """Return the step from which on a set stays more than FALL below its best before; None if it does not."""
    fell = None
    for i, row in enumerate(rows):
        below = i > 0 and max(r.value for r in rows[:i]) - row.value > FALL
        fell = (fell or row.step) if below else None
    return fell


def table(found: dict[str, list[Found]]) -> str:
    """Return a Markdown table: one line for each run."""
    lines = [
        "| teacher | seed | tools, % (best) | general, % (best) | falls at step | first warning | steps before |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in found.items():
        for seed, one in enumerate(runs):
            shares = [
                f"{100 * one.last[task]:.1f} ({100 * one.best[task]:.1f})" if task in one.last else "–"
                for task in ("tools", "general")
            ]
            fell = "–" if one.fell is None else f"{one.fell[0]} ({one.fell[1]})"
            first = "–" if one.first is None else f"{one.first[1]} at {one.first[0]}"
            lead = str(one.fell[0] - one.first[0]) if one.fell and one.first else "–"
            lines.append(f"| {name} | {seed} | {' | '.join(shares)} | {fell} | {first} | {lead} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", choices=VARIANTS, nargs="+", help="run these variants (default: ema-0.02 and frozen)")
    parser.add_argument("--full", action="store_true", help="all variants, three seeds")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), help="number of seeds")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/stability"), help="folder of the runs")
    given = parser.parse_args()
    names = given.only or (list(VARIANTS) if given.full else SMALL)
    seeds = SEEDS[: given.seeds or (len(SEEDS) if given.full else 1)]
    run_all({(name, seed): VARIANTS[name] for seed in seeds for name in names}, given.runs, given.set, given.jobs)
    places = {name: [given.runs / f"{name}-{seed}" for seed in seeds] for name in names}
    found = {
        name: [found_in(read_rows(place, EvalResult), read_rows(place, StepMetrics)) for place in of_variant]
        for name, of_variant in places.items()
    }
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
