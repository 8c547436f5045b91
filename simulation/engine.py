"""Simulated engines with the interface of real ones, for tests and benchmarks of pools and controller.

A method returns its duration in seconds and its result. Time is the event loop's, which may be virtual too.
"""

import asyncio
from typing import Any

from ray.exceptions import RayActorError

from sdft.actors.shared.drafts import Completion, Scores
from sdft.actors.shared.types import Process, Snapshot, Support, UpdateReport


class SimulatedEngine:
    """Returns (engine number, item) for each item after `seconds`. `die` fails all calls in progress."""

    def __init__(self, number: int, node: str = "here", seconds: float = 0.01) -> None:
        self.number, self.node, self.seconds = number, node, seconds
        self.version = 0
        self.killed = self.dead = False
        self._open: set[asyncio.Future[Any]] = set()

    async def placed(self) -> Process:
        return Process(1000 + self.number, self.node)

    async def call(self, method: str, *arguments: Any) -> Any:
        if self.dead:
            raise RayActorError
        seconds, result = getattr(self, method)(*arguments)
        if seconds == 0:
            return result
        loop = asyncio.get_running_loop()
        pending: asyncio.Future[Any] = loop.create_future()

        def ready() -> None:
            if not pending.done():
                pending.set_result(result)

        timer = loop.call_later(seconds, ready)
        self._open.add(pending)
        try:
            return await pending
        finally:
            self._open.discard(pending)
            timer.cancel()

    def kill(self, hangs: bool = False) -> None:
        self.killed = True
        self.die()

    def die(self) -> None:
        self.dead = True
        for pending in self._open:
            if not pending.done():
                pending.set_exception(RayActorError())

    def start(self) -> tuple[float, None]:
        return 0, None

    def ping(self) -> tuple[float, None]:
        return 0, None

    def generate(self, items: list[Any], argument: Any) -> tuple[float, list[Any]]:
        return self.seconds, [(self.number, item) for item in items]

    def complete(self, items: list[Any], argument: Any) -> tuple[float, list[Completion]]:
        seconds, rollouts = self.generate(items, argument)
        return seconds, [Completion.of(rollout) for rollout in rollouts]

    def score(self, pairs: list[Any], k: int) -> tuple[float, list[Any]]:
        raise NotImplementedError

    def score_completions(self, items: list[Any], support: Support) -> tuple[float, list[Scores]]:
        seconds, found = self.score([(prompt, c.rollout.completion_ids) for prompt, c in items], support.k)
        return seconds, [Scores(scores, scores.version) for scores in found]

    def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
        self.version = snapshot.version
        return 0, UpdateReport(snapshot.version, 0.0, 0.0)

    def stop(self) -> tuple[float, None]:
        return 0, None


class Relay:
    """Simulated snapshot relay of a node. On a node named "gone" every call raises RayActorError."""

    def __init__(self, node: str) -> None:
        self.node, self.killed = node, False
        self.calls = 0

    async def placed(self) -> Process:
        return Process(0, self.node)

    async def call(self, method: str, *arguments: Any) -> str:
        if self.node == "gone":
            raise RayActorError
        self.calls += 1
        return f"/on/{self.node}"

    def kill(self, hangs: bool = False) -> None:
        self.killed = True
