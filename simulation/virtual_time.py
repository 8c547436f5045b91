"""An event loop whose clock advances only when no task is ready to run.

Hours of a simulated cluster take seconds. The processor time is that of the control plane alone.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class _Selector(selectors.DefaultSelector):
    """Polls for real events without waiting. If there are none, advances the clock by the timeout."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(None if timeout is None else 0)
        if not events and timeout is not None:
            self.passed += timeout
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Event loop on the virtual clock. Executor calls run inline in no virtual time: it cannot wait for threads."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.passed

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done: asyncio.Future[Any] = self.create_future()
        done.set_result(func(*args))
        return done


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work` in virtual time and return its result."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
