"""A pool: the engines of one role. It divides batches among them and sends weights to all; engines join and leave.

    strict:   a batch in equal, contiguous shares, one per engine: the same bits in every run; the pool keeps its size
    streamed: each sequence by itself, to the least-loaded engine; another engine repeats the work of a lost one

Joining: start, load and verify the newest weights, serve. Leaving: take no more work, finish, stop.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import RayError

from sdft.actors.remote import Remote
from sdft.actors.shared.drafts import Completion, Scores
from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import (
    GenerateRequest,
    IntArray,
    Rollout,
    Sampling,
    Snapshot,
    Support,
    TeacherScores,
    UpdateReport,
)
from sdft.actors.shared.waiting import all_of, cancelled, within
from sdft.actors.transport.protocol import WeightTransport
from sdft.services.base.failures import Losses
from sdft.services.fleet.dispatch import Slots
from sdft.services.fleet.engine import EngineLost, Patience, SupervisedEngine
from sdft.services.fleet.versions import Versions

T = TypeVar("T")
Work = Coroutine[Any, Any, list[T]]  # results, one per item, in the order of the items
SOONEST_S = 1.0  # shortest delay before a pool below its least size retries
PLACED_S = 60.0  # a notice follows if Ray has not placed an engine by then; a new node may take that long


@dataclass(frozen=True)
class PoolSettings:
    """Settings of one pool."""

    name: str  # in the configuration
    least: int  # engines at the start, and the lower bound
    most: int
    strict: bool
    room: int  # most sequences in flight per engine
    patience: Patience
    batch_s: float  # limit for a batch
    drain_s: float  # limit for a leaving engine to finish its work
    one_by_one: bool  # engines load new weights in turn
    sleeps: bool = False  # `asleep` frees the engines' GPU memory


class EnginePool:
    """The engines of one role. `start` starts the first ones."""

    def __init__(
        self,
        settings: PoolSettings,
        create: Callable[[int], Remote],
        transport: WeightTransport,
        notice: Callable[[str], None],
        wanting: Callable[[], str],
    ) -> None:
        """create(number): starts an engine's process. notice(text): an engine is lost, joins or leaves.

        wanting(): returns as text what an engine needs and what the cluster has.
        """
        self.settings, self.transport = settings, transport
        self.versions = Versions()
        self._create, self._notice, self._wanting = create, notice, wanting
        self._engines: list[SupervisedEngine] = []  # without those that are leaving
        self._slots: Slots[SupervisedEngine] = Slots(settings.room, lambda: asyncio.get_running_loop().time())
        self._moving: set[asyncio.Task[None]] = set()  # tasks of engines that join or leave
        self._joining: set[SupervisedEngine] = set()
        self._number = 0
        self._refusals = Losses()  # engines that did not join
        self._not_before = 0.0  # no engine joins earlier, on the loop's clock

    async def start(self) -> None:
        """Start the first engines concurrently."""
        engines = [self._new() for _ in range(self.settings.least)]
        self._engines += engines
        await all_of([engine.start() for engine in engines])

    @property
    def engines(self) -> Sequence[SupervisedEngine]:
        """The current engines, without those that join or leave."""
        return self._engines

    @property
    def size(self) -> int:
        """Number of engines, including those that are joining."""
        return len(self._engines) + len(self._joining)

    @property
    def changing(self) -> bool:
        """Whether any engine joins, leaves or is being replaced."""
        return bool(self._moving or self._joining) or not all(engine.up for engine in self._engines)

    @property
    def queued(self) -> int:
        """Sequences that wait for an engine."""
        return self._slots.queued

    @property
    def at_work(self) -> str:
        """Sequences in flight by engine, as text for people; only a streamed pool counts them."""
        loads = [f"{engine.name} has {load} in flight" for engine, load in self._slots.loads.items()]
        return ", ".join([*loads, f"{self._slots.queued} wait for a {self.settings.name} engine"])

    def busy(self) -> float:
        """Return the share of the engines' room in use since the last call, 0 to 1."""
        return self._slots.busy()

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling, limited: bool = True) -> Work[Rollout]:
        """Return one rollout per request, in the order of the requests.

        limited: TimeoutError after settings.batch_s. If False, a streamed pool leaves the limit to the caller; a strict
        pool limits each attempt anyway.
        """
        return self._spread("generate", requests, sampling, limited)

    def score(self, pairs: Sequence[tuple[IntArray, IntArray]], k: int, limited: bool = True) -> Work[TeacherScores]:
        """Return teacher scores with the top k, one per (teacher prompt, completion) pair, in order.

        limited: as in `generate`.
        """
        return self._spread("score", pairs, k, limited)

    def complete(
        self, requests: Sequence[GenerateRequest], sampling: Sampling, limited: bool = True
    ) -> Work[Completion]:
        """As `generate`; the rollouts stay where they were made."""
        return self._spread("complete", requests, sampling, limited)

    def score_completions(
        self, items: Sequence[tuple[IntArray, Completion]], support: Support, limited: bool = True
    ) -> Work[Scores]:
        """As `score`, for (teacher prompt, completion) pairs and a support; the scores stay where they were made.

        Raises CompletionLost if a completion was lost with the engine that made it.
        """
        return self._spread("score_completions", items, support, limited)

    async def update_weights(self, snapshot: Snapshot) -> list[UpdateReport]:
        """Update every engine to a snapshot, while `versions` offers it; each engine verifies it.

        Returns or raises once no engine loads any more. Engines that are being replaced send no report; their
        replacements load the version before they serve.
        """
        serving = [engine.destination for engine in self._engines if engine.up]
        async with self.transport.sending(snapshot, serving, self.versions.timeout_s):
            turns = asyncio.Semaphore(1 if self.settings.one_by_one else len(self._engines))

            async def update(engine: SupervisedEngine) -> UpdateReport | None:
                async with turns:
                    return await engine.update_weights(snapshot)

            outcomes = await asyncio.gather(*map(update, self._engines), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return [report for report in outcomes if isinstance(report, UpdateReport)]

    @asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """Leave the engines' GPU memory to others inside the block, if the pool's engines sleep.

        Nothing may be in flight. An engine that is replaced meanwhile is awake.
        """
        if not self.settings.sleeps:
            yield
            return
        await self._every("sleep", "to free its GPU's memory")
        try:
            yield
        finally:
            await self._every("wake", "to take its GPU's memory back")

    async def _every(self, method: str, what: str) -> None:
        limit = self.settings.patience.start_s
        await all_of([engine.call(what, limit, method) for engine in self._engines])

    def resize(self, wanted: int) -> None:
        """Let engines join, or leave (newest first), until the pool has `wanted`. Returns at once; work goes on."""
        if asyncio.get_running_loop().time() >= self._not_before:
            for _ in range(self.size, wanted):
                self._join()
        for engine in self._engines[max(wanted, self.settings.least) :]:
            self._leave(engine, "leaves, because the pool needs fewer engines")

    def vacate(self, nodes: set[str]) -> None:
        """Let engines leave these nodes, which are being drained, and let as many join elsewhere."""
        if self.settings.strict:
            return  # a strict pool keeps its engines; they are replaced once lost
        for engine in [e for e in self._engines if e.process.node in nodes]:
            # The engine keeps its place until the other one has joined: Ray counts a free place on a draining node as
            # available, and its autoscaler would add no node.
            self._leave(engine, "leaves its node, which is being drained", self._join())

    async def stop(self) -> None:
        """Stop every engine and the transport."""
        await cancelled(self._moving)
        await asyncio.gather(*(engine.stop() for engine in (*self._engines, *self._joining)))
        self.transport.stop()

    def _new(self) -> SupervisedEngine:
        number, self._number = self._number, self._number + 1
        return SupervisedEngine(
            f"{self.settings.name} engine {number}",
            lambda: self._create(number),
            self.settings.patience,
            self.versions,
            self.transport,
            self._notice,
            self._changed,
        )

    def _changed(self, engine: SupervisedEngine) -> None:
        if engine in self._joining and engine.up:
            # No await separates the end of its load from this append: an update in between would miss the engine.
            self._joining.discard(engine)
            self._refusals.recovered()
            self._engines.append(engine)
            self._notice(f"{engine.name} has joined (process {engine.process.pid}); the pool has {self._engines_now}")
        elif engine in self._joining and engine.failure is not None:
            self._joining.discard(engine)
            self._notice(f"{engine.name} did not join: {engine.failure}")
        if engine not in self._engines:
            return
        if engine.up:
            self._slots.join(engine)
            return
        self._slots.leave(engine)
        if engine.failure is not None:
            if len(self._engines) > self.settings.least:
                self._engines.remove(engine)
                self._notice(f"{engine.failure}; the pool continues with {self._engines_now}")
            else:
                self._slots.fail(engine.failure)

    def _join(self) -> asyncio.Task[None]:
        engine = self._new()
        self._joining.add(engine)
        return self._move(self._joined(engine))

    def _leave(self, engine: SupervisedEngine, why: str, after: asyncio.Task[None] | None = None) -> None:
        self._engines.remove(engine)
        self._slots.leave(engine)
        engine.abandon()
        self._notice(f"{engine.name} {why}; the pool has {self._engines_now}")
        self._move(self._left(engine, after))

    def _move(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)
        return task

    async def _joined(self, engine: SupervisedEngine) -> None:
        starting = asyncio.ensure_future(engine.start())
        try:
            await asyncio.wait([starting], timeout=PLACED_S)
            if not engine.placed:
                self._notice(f"{engine.name} waits for a place: {self._wanting()}")
            await starting
        except asyncio.CancelledError:
            starting.cancel()
            await engine.stop()
            raise
        except (RayError, TimeoutError) as error:  # the run goes on without the engine
            self._joining.discard(engine)
            await engine.stop()
            self._refusals.count()
            self._not_before = asyncio.get_running_loop().time() + self._refusals.back_off_s
            self._notice(f"{engine.name} did not join: {reason(error)}")
            if self.size < self.settings.least:
                self._move(self._join_later())

    async def _join_later(self) -> None:
        """Retry by itself in a pool with too few engines: without them no step may end, and steps trigger `resize`."""
        await asyncio.sleep(max(self._refusals.back_off_s, SOONEST_S))
        if self.size < self.settings.least:
            self._join()

    async def _left(self, engine: SupervisedEngine, after: asyncio.Task[None] | None) -> None:
        try:
            # Work that is unfinished after drain_s fails with the engine, and another engine repeats it.
            idle = asyncio.ensure_future(self._slots.idle(engine))
            await asyncio.wait([idle] if after is None else [idle, after], timeout=self.settings.drain_s)
        finally:
            await engine.stop()
            if all(other.process.node != engine.process.node for other in (*self._engines, *self._joining)):
                self.transport.vacated(engine.process.node)  # a relay would keep the node from being released

    @property
    def _engines_now(self) -> str:
        return f"{len(self._engines)} {self.settings.name} engine{'' if len(self._engines) == 1 else 's'}"

    def _spread(self, method: str, items: Sequence[Any], argument: Any, limited: bool) -> Work[Any]:
        """Return a coroutine, as its callers do: each frame that awaits costs memory and time for every sample."""
        if self.settings.strict:
            return self._shares(method, items, argument)
        if len(items) == 1 and not limited:
            return self._one(method, items, argument)
        return self._each(method, items, argument, limited)

    async def _each(self, method: str, items: Sequence[Any], argument: Any, limited: bool) -> list[Any]:
        """Each item by itself, from an engine with room."""
        work = all_of([self._one(method, [item], argument) for item in items])
        if limited:
            what = f"the {self.settings.name} engines to {method} {len(items)} sequences"
            work = within(work, self.settings.batch_s, what)
        return [result for (result,) in await work]

    async def _shares(self, method: str, items: Sequence[Any], argument: Any) -> list[Any]:
        """Contiguous, equal shares: the assignment depends only on the numbers of items and engines."""
        n = len(self._engines)
        bounds = [len(items) * i // n for i in range(n + 1)]
        calls = [
            engine.call(f"to {method} {b - a} sequences", self.settings.batch_s, method, items[a:b], argument)
            for engine, a, b in zip(self._engines, bounds, bounds[1:], strict=False)
            if b > a
        ]
        return [result for part in await all_of(calls) for result in part]

    async def _one(self, method: str, items: Sequence[Any], argument: Any) -> list[Any]:
        """The result for a list of one item from an engine with room; another one repeats it if that one is lost."""
        while True:
            engine = await self._slots.take()
            try:
                (result,) = await engine.attempt(method, items, argument)
            except EngineLost:
                continue
            finally:
                self._slots.give_back(engine)
            return [result]
