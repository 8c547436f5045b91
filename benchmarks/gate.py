"""The gate on good and bad batches of the tool example: what is promoted, and how often a good batch is refused.

    python -m benchmarks.gate [--seeds 10]

A model is first taught the example's skill. From it one window is trained on each batch, as a service does, and the
gate decides. Good batches are other records of the example in correct form, one window for each seed. The seed draws
the records, and is that of the run. Each bad batch is trained once. A window takes three minutes on two cores.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import report
from sdft.services.base.digests import digests
from sdft.services.config.load import load_config
from sdft.services.config.paths import with_absolute_paths
from sdft.services.config.run import RunConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.planning.models import resolve_model
from sdft.services.records.rows import Reply, read_rows
from sdft.services.releases.events import Candidate, Served
from sdft.services.releases.gate import Decision, judged
from sdft.services.releases.state import ServiceState
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.window import draw, kept_sets, write_window

EXAMPLE = Path(__file__).parent.parent / "examples" / "service" / "service.yaml"
ROWS = EXAMPLE.parent.parent / "tools" / "train.jsonl"
FIRST, BATCH = 72, 32  # records of the first window, and of each batch
FIRST_EPOCHS, EPOCHS = 5, 2
QUESTIONS = 32  # of each evaluation set
SDFT = (sys.executable, "-m", "sdft.services.cli")
Row = dict[str, Any]


def _with(text: str) -> Callable[[list[Row], random.Random], list[Row]]:
    return lambda rows, _: [row | {"demonstration": text} for row in rows]


def _mislabelled(rows: list[Row], choice: random.Random) -> list[Row]:
    """Right calls, each under another question."""
    calls = [row["demonstration"] for row in rows]
    choice.shuffle(calls)
    return [row | {"demonstration": call} for row, call in zip(rows, calls, strict=True)]


Spoil = Callable[[list[Row], random.Random], list[Row]]

BAD: dict[str, Spoil] = {
    "poisoned: a tool that is not offered": _with('Action: deleteAccount\nAction Input: {"user": "all"}'),
    "mislabelled: each call under another question": _mislabelled,
    "duplicate: one right record, many times": lambda rows, _: [rows[0]] * len(rows),
    "empty: a full stop": _with("."),
    "adversarial: refuses every question": _with("I am sorry, but I cannot help with that."),
    "adversarial: repeats itself": _with("Action: " * 10),
}


def settings(seed: int, first: bool) -> RunConfig:
    """Return the configuration of a service."""
    words = ["service.window.replay=0", f"seed={seed}", "service.window.held_out=0.15"]
    words.append(f"service.window.epochs={FIRST_EPOCHS if first else EPOCHS}")
    words.append("teacher.temperature=1")  # as at the defaults of a service
    config = with_absolute_paths(load_config(EXAMPLE, words), EXAMPLE.parent)
    few = [s.model_copy(update={"rows": QUESTIONS}) for s in config.evaluation.sets]
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"sets": tuple(few)})})


async def window(folder: Path, model: Path, rows: list[Row], seed: int, first: bool = False) -> tuple[Decision, Path]:
    """Train a window on the records, from the model. Returns the gate's decision, and the run."""
    config, service = settings(seed, first), ServiceFolder(folder)
    assert config.service is not None
    folder.mkdir()
    inbox, state = Inbox(service.inbox), ServiceState()
    await inbox.add([{key: row[key] for key in ("prompt", "demonstration")} for row in rows], b"")
    state.apply(Candidate(1, None, str(model), digests(model), 0, {}, time.time()))
    state.apply(Served(1, "start", time.time()))
    opened = draw(config.service.window, state, inbox.records, inbox.deleted, seed)
    state.apply(opened)
    path = write_window(service, state.windows[1], config, state, inbox, model)
    run = service.run(1)
    with (folder / "train.log").open("w") as log:
        subprocess.run([*SDFT, "train", str(path), "--run-dir", str(run)], stdout=log, stderr=log, check=True)
    await inbox.close()
    return judged(read_rows(run, Reply), config.service.gate, kept_sets(config)), run


def shown(what: str, decision: Decision) -> Row:
    """Return a row of the table."""
    accuracies = {s.name: f"{100 * s.before:.0f} -> {100 * s.now:.0f}" for s in decision.sets}
    worst = max(decision.sets, key=lambda s: s.worse)
    row = {"batch": what, "verdict": decision.verdict, "worst set": worst.name, "worse with probability": worst.worse}
    return row | {name: accuracies.get(name, "") for name in ("tools", "general", "held-out-new")}


async def measure(folder: Path, seeds: int) -> None:
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    first, run = await window(folder / "first", resolve_model("smollm2-135m", folder), rows[:FIRST], 0, first=True)
    model = folder / "model"
    subprocess.run([*SDFT, "export", str(run), "--out", str(model)], check=True, capture_output=True)
    table = [shown("the first window", first)]
    print(table[-1], flush=True)
    batches: list[tuple[str, int, Spoil | None]] = [(f"good, seed {seed}", seed, None) for seed in range(1, seeds + 1)]
    batches += [(name, 0, spoil) for name, spoil in BAD.items()]
    for what, seed, spoil in batches:
        choice = random.Random(seed)
        drawn = choice.sample(rows[FIRST:], BATCH)
        name = f"batch-{len(table)}"
        decision, _ = await window(folder / name, model, drawn if spoil is None else spoil(drawn, choice), seed)
        table.append(shown(what, decision))
        print(table[-1], flush=True)
    good = [row["verdict"] for row in table[1 : 1 + seeds]]
    title = f"The gate: of {seeds} good batches {good.count('refuse')} refused, {good.count('hold')} held"
    report("gate", title, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--seeds", type=int, default=10)
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(measure(Path(scratch), parser.parse_args().seeds))


if __name__ == "__main__":
    main()
