"""`sdft replay`: run the learner alone on the batches that a run recorded, and report the first difference.

    rollouts/step-N.npz -> learner: step -> its figures and state -> compared with metrics.jsonl and checkpoints/

No engine is started, so any difference comes from the learner.
"""

import math
import tempfile
from pathlib import Path

from rich.console import Console

from sdft.actors.config import LEARNER
from sdft.services.base.errors import UserError
from sdft.services.base.signals import run_until_stopped
from sdft.services.cluster.cluster import places
from sdft.services.config.load import load_config
from sdft.services.planning.capacity import check_memory
from sdft.services.planning.plan import Plan
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.batches import read_batch, recorded_steps
from sdft.services.records.rows import Event, StepMetrics, read_rows
from sdft.services.records.run_dir import check_run_dir

COMPARED = ("loss", "divergence", "mismatch_kl", "tail_mass", "grad_norm", "lr")


def replay(run_dir: Path, steps: str | None, console: Console) -> str | None:
    """Replay steps "a:b" (both included; None: all recorded) and return the first difference, None if there is none.

    Starts from the newest undamaged checkpoint before step a, else from the base model. Raises UserError if the run did
    not record all steps from there on.
    """
    check_run_dir(run_dir)
    recorded = recorded_steps(run_dir)
    if not recorded:
        raise UserError(
            f"{run_dir}: this run recorded no rollouts; set monitoring.record_rollouts: true before it is started"
        )
    first, last = _range(steps, recorded)
    start, notes = checkpoints.newest(run_dir, before=first)
    for note in notes:
        console.print(note, soft_wrap=True)
    begin = 0 if start is None else checkpoints.read_state(start).step
    missing = sorted(set(range(begin + 1, last + 1)) - set(recorded))
    if missing:
        raise UserError(
            f"{run_dir}: the rollouts of step {missing[0]} were not recorded, and a replay of steps {first} to {last} "
            f"must start from {start or 'the base model'}; give other --steps"
        )
    begun = checkpoints.begun(run_dir, "auto")
    prepared = prepare(load_config(run_dir / "config.yaml"), run_dir / "config.yaml", begun=begun)
    plan = Plan({}, prepared.plan.learners, card_gib=prepared.plan.card_gib, load=prepared.plan.load)
    check_memory(prepared.config, plan)
    console.print(f"replaying steps {begin + 1} to {last} from {start or 'the base model'}", soft_wrap=True)
    return run_until_stopped(_run(prepared, plan, run_dir, start, range(begin + 1, last + 1), console))


async def _run(
    prepared: Prepared, plan: Plan, run_dir: Path, start: Path | None, steps: range, console: Console
) -> str | None:
    from sdft.learner.checkpoint.state import first_difference
    from sdft.services.training.learner import start_learner

    c = prepared.config
    rows = {row.step: row for row in read_rows(run_dir, StepMetrics)}
    refreshed = {event.step for event in read_rows(run_dir, Event) if event.kind == "refreshed"}
    async with places(c.ray, plan) as options:
        group = await start_learner(prepared, options[LEARNER])
        if start is not None:
            await group.load(start)
        for step in steps:
            if step > 1 and step == prepared.schedule.at(step).before + 1:
                await group.begin_stage()
            result = await group.train_step(read_batch(run_dir, step))
            if step in refreshed:
                await group.refresh_teacher()
            if step not in rows:
                return f"step {step}: its rollouts were recorded, but metrics.jsonl has no such step"
            for name in COMPARED:
                was, now = getattr(rows[step], name), getattr(result, name)
                if was != now and not (math.isnan(was) and math.isnan(now)):
                    return f"step {step}: {name} was {was!r} and is {now!r}"
            kept = checkpoints.folder_of(run_dir, step)
            if kept.is_dir():
                with tempfile.TemporaryDirectory(prefix="sdft-replay-") as scratch:
                    await group.save(Path(scratch))
                    await group.written()
                    different = first_difference(kept, Path(scratch))
                if different is not None:
                    return f"step {step}: {different} differs from {kept}"
            console.print(f"step {step}: the same{' to the last bit of its state' if kept.is_dir() else ''}")
    return None


def _range(steps: str | None, recorded: list[int]) -> tuple[int, int]:
    """Return the first and the last step of "a:b", "a:", ":b" or "a"."""
    first, colon, last = (steps or ":").partition(":")
    try:
        a = int(first) if first else recorded[0]
        b = int(last) if last else recorded[-1] if colon else a
    except ValueError:
        raise UserError(f"--steps {steps}: give one step, or the first and the last as in 3:7") from None
    if not recorded[0] <= a <= b <= recorded[-1]:
        raise UserError(f"--steps {steps}: the run recorded steps {recorded[0]} to {recorded[-1]}; choose among them")
    return a, b
