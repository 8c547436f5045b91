"""`make continual`: small versions of the paper's experiments, each a comparison of a few runs.

    experiments ─► variants ─► `sdft train CONFIG --set ...`, one run after the other ─► their results ─► tables, a plot

Runs are in runs/continual/VARIANT-SEED, and experiments share the runs that they have in common. When the script is
started again, finished runs are not repeated and unfinished ones resume. By default it runs the experiment `small`:
SDFT and SFT once with fewer steps, in under an hour on two cores. `--only` names other experiments. `--full` runs all
of those, with four learning rates for each method and three seeds. The figures of the sequence go into sequence.json
beside the plot; `--plot FILE` draws the plot of such a file again.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from threading import Event
from typing import Any

from sdft.services.analysis.matrix import Estimate, over_runs, read_matrix
from sdft.services.records.rows import STUDENT_ACCURACY, EvalResult, read_rows

HERE = Path(__file__).parent
STREAM, RECALL = HERE / "continual.yaml", HERE / "reinvoke.yaml"
TOOLS, FACTS = HERE.parent / "tools" / "tools.yaml", HERE.parent / "facts" / "facts.yaml"
RATES, SEEDS = (1e-5, 2e-5, 5e-5, 1e-4), (0, 1, 2)
SHARP = 0.7  # teacher.temperature
COLOURS = {
    "sdft": "#0072b2",
    "sharpened": "#cc79a7",
    "off_policy": "#56b4e9",
    "sft": "#d55e00",
    "dft": "#e69f00",
    "reinvoke": "#009e73",
}
SKILLS, KEPT = "average accuracy", "retention general"


@dataclass(frozen=True)
class Variant:
    """A configuration with changed settings. Its runs differ only in their seed."""

    name: str
    config: Path
    settings: dict[str, Any]


def stream(method: str, lr: float) -> Variant:
    """Three skills in sequence."""
    name = f"{method}-{rate(lr)}"
    if method == "reinvoke":  # SFT, with stages of its own
        return Variant(name, RECALL, {"learner.optimizer.lr": lr})
    if method == "sharpened":  # SDFT with a sharpened teacher
        return Variant(name, STREAM, {"teacher.temperature": SHARP, "learner.optimizer.lr": lr})
    key = "method.type" if method in ("sdft", "off_policy") else "method"  # the former keeps method.skip_first
    return Variant(name, STREAM, {key: method, "learner.optimizer.lr": lr})


def rate(lr: float) -> str:
    """Format a learning rate as 5e-5, not 5e-05."""
    return f"{lr:.0e}".replace("e-0", "e-")


def short(variant: Variant) -> Variant:
    """Shorten a stream to 55 steps instead of 180, with about half of the questions on its skills."""
    steps = {"stages.tools.steps": 15, "stages.routing.steps": 20, "stages.facts.steps": 20}
    sets = {"tools.sets.tools": 60, "routing.sets.routing": 60, "facts.sets.indirect": 24, "facts.sets.reworded": 24}
    fewer = {f"stages.{name}.rows": rows for name, rows in sets.items()}
    return Variant(f"short-{variant.name}", variant.config, variant.settings | steps | fewer)


def skill(name: str, **settings: Any) -> Variant:
    """Tool calls alone, at a constant rate and with the teacher's own distributions, as in the streams."""
    usual = {
        "training.steps": 40,
        "learner.optimizer.lr": 5e-5,
        "learner.optimizer.schedule": "constant",
        "teacher.temperature": 1.0,
        "weights.teacher_sync_every": 10,
        "evaluation.every": 20,
        "evaluation.sets.tools.max_new_tokens": 64,
        "checkpoint.every": 20,
        "checkpoint.keep": 1,
    }
    return Variant(f"tools-{name}", TOOLS, usual | dotted(settings))


def facts(name: str, **settings: Any) -> Variant:
    """Invented facts alone."""
    return Variant(f"facts-{name}", FACTS, {"checkpoint.keep": 1} | dotted(settings))


def dotted(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn keywords such as teacher__weights into keys such as teacher.weights."""
    return {key.replace("__", "."): value for key, value in settings.items()}


TRIED = (("sdft", 5e-5), ("sft", 1e-5), ("sft", 5e-5), ("sdft", 2e-5), ("dft", 5e-5), ("reinvoke", 5e-5))
FULL = [stream(method, lr) for method in COLOURS for lr in RATES]
SAMPLED = {
    **{"name": "tools", "file": "heldout.jsonl", "grader": "tool_call", "max_new_tokens": 48},
    **{"pass_at": [1, 2, 4, 8, 16], "pass_samples": 32},
}
USUAL = skill("sdft")  # EMA teacher, forward KL, 64 tokens of support
EXPERIMENTS = {
    "small": [short(stream("sdft", 5e-5)), short(stream("sft", 1e-5))],
    "sequence": [stream(method, lr) for method, lr in TRIED],
    "sharpened": [stream("sharpened", lr) for lr in (2e-5, 5e-5)],
    "teacher": [USUAL, skill("frozen", teacher__weights="frozen"), skill("live", teacher__weights="live")],
    "divergence": [
        USUAL,
        skill("reverse", method__divergence="reverse"),
        skill("jsd", method__divergence="jsd"),
        skill("sampled", method__divergence="sampled"),
        skill("k8", method__divergence__top_k=8),
    ],
    "policy": [USUAL, skill("off-policy", method__type="off_policy"), skill("sft", method="sft")],
    "knowledge": [
        facts("answer"),
        facts("text", data__train="articles.jsonl", data__template="context"),
        facts("text-and-answer", data__train="articles.jsonl"),
        facts("sft", method="sft"),
        facts("sft-1e-5", method="sft", learner__optimizer__lr=1e-5),
    ],
    "pass-at-k": [
        skill("pass-sdft", evaluation__every=None, evaluation__sets=[SAMPLED]),
        skill("pass-sft", evaluation__every=None, evaluation__sets=[SAMPLED], method="sft"),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--full", action="store_true", help="all experiments but small, three seeds, every method at four rates"
    )
    parser.add_argument(
        "--seeds", type=int, choices=range(1, len(SEEDS) + 1), help="number of seeds (default: 1; 3 with --full)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at the same time (default: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting in all runs"
    )
    parser.add_argument("--only", choices=EXPERIMENTS, nargs="+", help="run only these experiments")
    parser.add_argument("--runs", type=Path, default=Path("runs/continual"), help="folder of the runs")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="only plot this sequence.json, as .svg beside it")
    given = parser.parse_args()
    if given.plot:
        plot(given.plot)
        return
    chosen = given.only or ([name for name in EXPERIMENTS if name != "small"] if given.full else ["small"])
    experiments = {name: variants for name, variants in EXPERIMENTS.items() if name in chosen}
    if given.full and "sequence" in experiments:
        experiments["sequence"] = FULL
    seeds = SEEDS[: given.seeds or (len(SEEDS) if given.full else 1)]
    todo = {(v.name, seed): v for seed in seeds for variants in experiments.values() for v in variants}
    run_all(todo, given.runs, given.set, given.jobs)
    for name, variants in experiments.items():
        found = {v.name: [figures(given.runs / f"{v.name}-{seed}") for seed in seeds] for v in variants}
        compared = {variant: over_runs(runs) for variant, runs in found.items()}
        print(f"\n{name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}, %\n\n{table(compared)}")
        if name == "sequence":
            path = given.runs / "sequence.json"
            points = {v: [[round(100 * run[key], 1) for key in (KEPT, SKILLS)] for run in found[v]] for v in found}
            lines = [f"  {json.dumps(variant)}: {json.dumps(runs)}" for variant, runs in points.items()]
            path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            print(f"\nplot: {plot(path)}; one run's matrix: sdft matrix {given.runs}/NAME")


def run_all(todo: Mapping[tuple[str, int], Variant], folder: Path, more: Sequence[str], jobs: int) -> None:
    """Run each variant with its seed, in `folder`/VARIANT-SEED, so many of them at the same time.

    CalledProcessError if one fails. Runs in progress then end normally, and no other begins. more: as in `run`.
    """
    failed = Event()

    def in_turn(number: int, name: str, seed: int) -> None:
        if failed.is_set():
            return
        try:
            run(todo[name, seed], seed, folder / f"{name}-{seed}", f"run {number} of {len(todo)}", more)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(in_turn, range(1, len(todo) + 1), *zip(*todo, strict=True)))


def run(variant: Variant, seed: int, run_dir: Path, label: str, more: Sequence[str]) -> None:
    """Run a variant to its end, unless it has finished already. CalledProcessError if it fails.

    Its output goes to output.log. more: settings of all runs, KEY=VALUE each.
    """
    state = run_dir / "run.json"
    if state.exists() and json.loads(state.read_text())["state"] == "finished":
        return
    print(f"{label}: {run_dir}", flush=True)
    settings = variant.settings | {"seed": seed}
    chosen = [*(f"{key}={json.dumps(value)}" for key, value in settings.items()), *more]
    words = [word for setting in chosen for word in ("--set", setting)]
    train = [sys.executable, "-m", "sdft.services.cli", "train", str(variant.config), "--run-dir", str(run_dir)]
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "output.log").open("ab") as log:
        subprocess.run(train + words, stdout=log, stderr=log, check=True)


def figures(run_dir: Path) -> dict[str, float]:
    """Return a run's results: the metrics of a stream, else the last share of each set."""
    results = [
        r for r in read_rows(run_dir, EvalResult) if r.metric == STUDENT_ACCURACY or r.metric.startswith("pass@")
    ]
    if any(r.stage > 0 for r in results):
        return read_matrix(run_dir).metrics()
    last = max(r.step for r in results)
    return {r.label: r.value for r in results if r.step == last}


def table(compared: dict[str, dict[str, Estimate]]) -> str:
    """Format a Markdown table: a row per variant, shares in percent with half of the 95 % interval over seeds."""
    names = list(dict.fromkeys(name for found in compared.values() for name in found))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for variant, found in compared.items():
        cells = [text(found[name]) if name in found else "–" for name in names]
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def text(e: Estimate) -> str:
    half = "" if math.isnan(e.half) else f" ± {100 * e.half:.1f}"
    return f"{100 * e.mean:.1f}{half}"


def plot(path: Path) -> Path:
    """Plot accuracy on the skills against general questions kept: a line over the rates for each method, seeds faint.

    path: {"METHOD-RATE": [[general questions kept, mean accuracy on the skills], ...]}, in percent, a pair a seed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for variant, runs in json.loads(path.read_text()).items():
        method, _, lr = variant.partition("-")
        kept, learnt = zip(*runs, strict=True)
        lines.setdefault(method, []).append((float(lr), fmean(kept), fmean(learnt)))
        if len(runs) > 1:
            axes.plot(kept, learnt, "o", color=COLOURS[method], alpha=0.35, markersize=4)
    for method, points in lines.items():
        draw(axes, sorted(points), method)
    axes.set_xlabel("general questions kept, % (before training: 100)")
    axes.set_ylabel("mean accuracy on all three skills at the end, %")
    axes.grid(color="#eceff3")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sequence"}):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path.with_suffix(".svg")


def draw(axes: Any, points: Sequence[tuple[float, float, float]], method: str) -> None:
    """Draw the points (learning rate, kept, learnt), each labelled with its rate."""
    _, kept, learnt = zip(*points, strict=True)
    axes.plot(kept, learnt, "o-", color=COLOURS[method], label=method)
    for lr, x, y in points:
        axes.annotate(rate(lr), (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, color="#6a737d")


if __name__ == "__main__":
    main()
