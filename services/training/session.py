"""A live run: start engines and learner, train with the controller, restart a lost learner.

    start engines and learner concurrently ─► train ─► done
                                               ▲  └─► learner lost ─► restart it from the last checkpoint ─┐
                                               └───────────────────────────────────────────────────────────┘

fleet/engine.py replaces lost engines. The run ends if the driver dies, and can be resumed.
"""

import asyncio
import json
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from sdft.actors.config import LEARNER
from sdft.actors.roles import STUDENT, TEACHER
from sdft.actors.shared.process import collect_rarely
from sdft.actors.shared.waiting import all_of, cancelled, unless
from sdft.learner.group import LearnerGroup, LearnerLost
from sdft.services.base.errors import RunFailed
from sdft.services.base.failures import Losses
from sdft.services.base.files import write_atomically
from sdft.services.cluster.cluster import cluster, placement
from sdft.services.cluster.nodes import NodeRequest, requested
from sdft.services.fleet.factory import engine_pool
from sdft.services.fleet.node_watch import watch_nodes
from sdft.services.fleet.pool import EnginePool
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.monitoring.sinks import Sinks
from sdft.services.monitoring.watchdog import Watchdog
from sdft.services.planning.prepared import Prepared
from sdft.services.records import checkpoints
from sdft.services.records.ledger import Ledger, restore_ledger
from sdft.services.training.controller import Controller
from sdft.services.training.learner import start_learner


async def run_session(prepared: Prepared, run_dir: Path, start: Path | None, console: Console) -> None:
    """Train to the end, from the checkpoint `start` or, if it is None, from the base model."""
    c = prepared.config
    collect_rarely()
    with (
        Progress(console, prepared.schedule.total_steps, prepared.path.stem) as progress,
        cluster(c.ray, prepared.plan, run_dir / "logs"),
        requested(f"sdft {run_dir.resolve()}", prepared.plan, c.ray.wait_s)
        if c.ray.autoscaling
        else nullcontext() as request,
    ):
        watching = asyncio.create_task(Watchdog(run_dir, c.monitoring.stall_s, progress.note).run())
        try:
            async with placement(c.ray, prepared.plan) as options:
                session = Session(prepared, run_dir, options, progress, request)
                try:
                    await session.start()
                    with Sinks(run_dir, c.monitoring, progress.note) as sinks:
                        await session.run_attempts(start, sinks)
                finally:
                    await session.stop()
        finally:
            await cancelled([watching])


class Session:
    """Engines and learner of a run in this process. An attempt ends with the run, or with the loss of the learner."""

    def __init__(
        self,
        prepared: Prepared,
        run_dir: Path,
        options: dict[str, list[dict[str, Any]]],
        progress: Progress,
        request: NodeRequest | None,
    ) -> None:
        """options: Ray actor options by pool, and of the learner, one per process.

        request: the node request to an autoscaler, if any.
        """
        self._prepared, self._run_dir = prepared, run_dir
        self._options, self._progress = options, progress
        self._request = request
        self._pools: dict[str, EnginePool] = {}
        self._learner: LearnerGroup | None = None

    async def start(self) -> None:
        """Start the learner and all engines concurrently."""
        self._progress.phase("starting engines and learner")
        await all_of([self._start_learner(), *map(self._start_pool, self._prepared.plan.pools)])
        self._write_pids()

    async def run_attempts(self, start: Path | None, sinks: Sinks) -> None:
        """Train to the end, from a checkpoint or the base model; a lost learner begins another attempt.

        RunFailed if the learner is lost more than learner.max_restarts times within an hour.
        """
        limit, losses = self._prepared.config.learner.max_restarts, Losses()
        while True:
            try:
                await self._attempt(start, sinks, losses)
                return
            except LearnerLost as error:
                times = losses.count()
                if times > limit:
                    raise RunFailed(
                        f"the learner was lost {times} times within an hour (learner.max_restarts: {limit}); the last "
                        f"time: {error}"
                    ) from error
                start = await self._restart_learner(error, losses.back_off_s) or start

    async def stop(self) -> None:
        """Stop the engines, then the learner: its published snapshots are lost with it."""
        await asyncio.gather(*(pool.stop() for pool in self._pools.values()))
        if self._learner is not None:
            self._learner.kill()

    async def _attempt(self, start: Path | None, sinks: Sinks, losses: Losses) -> None:
        """Train to the end with the current learner. Raises LearnerLost. A step ends the losses in a row."""
        assert self._learner is not None
        run_dir, first = self._run_dir, 0
        if start is not None:
            first = await self._learner.load(start)
            self._progress.note(f"continuing after step {first} from {start}")
        RunLog.rewind(run_dir, first if start else None)
        restore_ledger(start / checkpoints.LEDGER if start else None, run_dir / "ledger.sqlite")
        with closing(Ledger(run_dir / "ledger.sqlite")) as ledger, closing(RunLog(run_dir, sinks)) as log:
            ledger.forget_in_flight()
            roles = {name: self._prepared.config.actors.role_name(name) for name in self._pools}
            pools = {name if roles[name] == TEACHER else roles[name]: pool for name, pool in self._pools.items()}
            controller = Controller(self._prepared, run_dir, pools, self._learner, ledger, log, self._progress)
            watching = watch_nodes(self._pools, self._request, self._progress.note)
            failures = all_of([self._learner.until_lost(), watching])
            try:
                await unless(failures, controller.run(first))
            finally:
                if controller.steps_done > 0:
                    losses.recovered()

    async def _restart_learner(self, error: LearnerLost, after_s: float) -> Path | None:
        """Start a new learner and return the checkpoint to resume from; None if the run has saved none.

        UserError if there are checkpoints and all are damaged: a new start would remove the files of the run.
        """
        assert self._learner is not None
        self._progress.note(f"{error}; the learner restarts from the last checkpoint")
        self._learner.kill(hangs=True)
        for pool in self._pools.values():
            pool.versions.mark_lost()
        await asyncio.sleep(after_s)
        folder, notes = await asyncio.to_thread(checkpoints.newest_usable, self._run_dir)
        if folder is not None:
            notes += checkpoints.set_aside(self._run_dir, checkpoints.read_state(folder).step)
        for note in notes:
            self._progress.note(note)
        try:
            await self._start_learner()
        except (LearnerLost, TimeoutError) as again:  # counted as a loss when the first call to it fails
            self._progress.note(str(again))
        self._write_pids()
        return folder

    async def _start_pool(self, name: str) -> None:
        pool = engine_pool(
            self._prepared.config,
            self._prepared.folder_of(name),
            self._prepared.stop_ids,
            self._prepared.vocabulary,
            name,
            self._options[name],
            self._notice,
            self._current,
            keep_experts=self._prepared.replays_experts and self._prepared.config.actors.role_name(name) == STUDENT,
        )
        self._pools[name] = pool
        await pool.start()

    def _current(self) -> LearnerGroup:
        assert self._learner is not None
        return self._learner

    async def _start_learner(self) -> None:
        self._learner = await start_learner(self._prepared, self._options[LEARNER])

    def _notice(self, text: str) -> None:
        self._progress.note(text)
        self._write_pids()

    def _write_pids(self) -> None:
        """Write pids.json for people and for tests that kill processes. Ignores a full disk and other file errors."""
        if self._learner is None:
            return
        pids = {name: [e.process.pid for e in pool.engines] for name, pool in self._pools.items()}
        pids[LEARNER] = self._learner.pids
        with suppress(OSError):
            write_atomically(self._run_dir / "pids.json", json.dumps(pids).encode())
