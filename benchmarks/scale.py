"""Cost of the control plane with 1 to 1000 simulated student engines; controller, ledger, pools and policies are real.

    python -m benchmarks.scale            # about eight minutes, one core; tables, and benchmarks/scale.svg

simulation/cluster.py describes the simulation. An argument selects the cases whose name contains it. `--rates FILE`
sets the durations of your own cluster (simulation/rates.py). Function calls per sample, simulation included, show
whether a sample of a larger fleet needs more work, independent of processor caches.
"""

import argparse
import cProfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.given import file_of
from benchmarks.measure import report
from simulation.cluster import ROUNDS, USUAL, Case, simulate
from simulation.rates import Rates

SIZES = (1, 10, 30, 100, 300, 1000)
CASES = [
    *(Case(f"{n} engines", n, steps=12 if n < 1000 else 8) for n in SIZES),
    Case("balanced, strict", 100, staleness=0, learner=1.0),
    Case("balanced, 1 ahead", 100, staleness=1, learner=1.0),
    Case("balanced, 2 ahead", 100, staleness=2, learner=1.0),
    Case("balanced, 4 ahead", 100, staleness=4, learner=1.0, steps=20),
    Case("20 % of the engines take 4 times as long", 100, slow=0.2, steps=20),
    Case("the same, 8 ahead", 100, slow=0.2, staleness=8, steps=30),
    Case("each engine dies every 10 minutes", 100, lifetime_s=600, steps=40),
    Case("20 % take 8 s to load weights", 100, links=0.2, steps=20),
    Case("begins with a tenth of the engines", 100, begin_with=0.1, steps=60),
]
COUNTED = [Case(f"{n} engines", n, steps=max(4, 10000 // (ROUNDS * USUAL.room * n))) for n in (10, 100, 1000)]


def calls(case: Case) -> dict[str, Any]:
    """Function calls per sample over the whole case."""
    profile = cProfile.Profile()
    samples = profile.runcall(simulate, case)["samples"]
    made = sum(entry.callcount for entry in profile.getstats())
    return {"case": case.name, "samples": samples, "calls per sample": made / samples}


def draw(rows: list[dict[str, Any]]) -> None:
    """Plot the cost of a sample over the number of engines, and the learner's busy share in each case."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    cost, busy = figure.subplots(1, 2, width_ratios=(1, 1.3))
    sizes = [row for row in rows if row["case"] == f"{row['engines']} engines"]
    cost.plot([row["engines"] for row in sizes], [row["us per sample"] for row in sizes], marker="o")
    cost.set(xscale="log", xlabel="student engines", title="processor time of the control plane", ylim=(0, None))
    cost.set_ylabel("microseconds a sample")
    others = [row for row in rows if row not in sizes or row["engines"] == 100]
    busy.barh([row["case"] for row in others], [100 * row["learner busy"] for row in others], color="#009e73")
    busy.set(xlabel="% of the time that the learner works", xlim=(0, 100), title="100 student engines")
    busy.invert_yaxis()
    for axes in (cost, busy):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y" if axes is cost else "x", color="#eceff3")
        axes.set_axisbelow(True)
    figure.savefig(Path(__file__).parent / "scale.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("cases", nargs="?", default="", help="part of the names of the cases to run")
    what = "a YAML file with rates; what it leaves out is as here"
    parser.add_argument("--rates", type=file_of(Rates.read), default=USUAL, metavar="FILE", help=what)
    given = parser.parse_args()
    chosen = [replace(case, rates=given.rates) for case in CASES if given.cases in case.name]
    rows = [alone(simulate, case) for case in chosen]
    report("scale" if given.rates == USUAL else "scale_rates", "The control plane with simulated engines", rows)
    if chosen == CASES:
        draw(rows)
        report("scale_calls", "Function calls", [alone(calls, case) for case in COUNTED])


def alone(measure: Callable[[Case], dict[str, Any]], case: Case) -> dict[str, Any]:
    """Run `measure` in a new process: the next case would otherwise reuse the memory that one has freed."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
        return own.submit(measure, case).result(timeout=3600)


if __name__ == "__main__":
    main()
