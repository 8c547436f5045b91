"""Delivery of a role's weights from the learner to the role's engines, one version after the other.

    learner: publish ─► every engine: load, verify ─► release      the version is in use meanwhile (fleet/versions.py)

`deliver` waits until the engines have the weights. `publish` waits only for the publication: after it the learner may
change its weights, and the engines load while the learner continues.
"""

import asyncio
from collections.abc import Callable
from functools import partial

from sdft.actors.shared.reason import reason
from sdft.actors.shared.types import SnapshotDamaged
from sdft.actors.shared.waiting import cancelled
from sdft.learner.group import LearnerGroup
from sdft.services.base.errors import RunFailed
from sdft.services.fleet.pool import EnginePool

TRIES = 3  # snapshots in a row that are damaged or gone, until the error is raised


class WeightSync:
    """Delivers the weights of one role."""

    def __init__(
        self, role: str, pool: EnginePool, learner: LearnerGroup, timeout_s: float, notice: Callable[[str], None]
    ) -> None:
        self._role, self._pool, self._learner = role, pool, learner
        self._timeout_s, self._notice = timeout_s, notice
        self._delivery: asyncio.Task[None] | None = None
        self._damaged = 0  # snapshots in a row that are damaged or gone
        self._gap: float | None = None
        self._versions = pool.versions
        self._versions.verified = -1  # after a loss of the learner, engines have versions of the learner before
        self.on_delivered: Callable[[int], None] = lambda version: None  # called with each new `version`

    @property
    def version(self) -> int:
        """The newest version on all engines but those being replaced; -1: the weights they started with."""
        return self._versions.verified

    async def deliver(self, version: int) -> float | None:
        """Publish the learner's weights, which are this version, and wait until all engines have verified them.

        Returns the largest gap of an engine. Returns None if all engines are being replaced: their replacements verify
        the weights before they serve.
        """
        while True:
            await self.publish(version)
            await self._join_delivery()
            if self.version == version:
                return self._gap

    async def publish(self, version: int) -> None:
        """Publish the learner's weights, which are this version. Waits for an earlier delivery first."""
        await self.wait_delivered()
        published: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        delivery = asyncio.create_task(self._deliver(version, published), name=f"{self._role} weights v{version}")
        self._delivery = delivery  # from here on `wait_delivered` waits for this version
        try:
            await asyncio.wait([published, delivery], return_when=asyncio.FIRST_COMPLETED)
            if not published.done():
                await delivery  # raises
        except BaseException:
            self._delivery = None
            await cancelled([delivery])
            raise

    async def wait_delivered(self) -> None:
        """Wait until the engines have the weights that were sent.

        In a strict run a damaged snapshot is sent again at once: the learner still has that version. Otherwise the next
        version replaces it.
        """
        sent = await self._join_delivery()
        if sent is not None and self.version != sent and self._pool.settings.strict:
            await self.deliver(sent)

    async def wait_for_version(self, least: int, current: int) -> None:
        """Wait until the engines have version `least` or a later one. current: the learner's version."""
        await self.wait_delivered()
        if self.version < least:
            await self.deliver(current)

    async def stop(self) -> None:
        """Cancel the delivery in progress."""
        if self._delivery is not None:
            await cancelled([self._delivery])

    async def _join_delivery(self) -> int | None:
        """Wait for the delivery in progress and return its version; None if there is none."""
        delivery = self._delivery
        if delivery is None:
            return None
        await asyncio.shield(delivery)  # shielded: other callers may wait for the same delivery
        if self._delivery is delivery:
            self._delivery = None
        newest = self._versions.newest
        return None if newest is None else newest.version

    async def _deliver(self, version: int, published: asyncio.Future[None]) -> None:
        """Publish the version, complete `published`, and update the engines."""
        offer = partial(self._learner.publish, self._role, version)
        try:
            async with self._versions.offering(offer, self._timeout_s) as snapshot:
                published.set_result(None)
                reports = await self._pool.update_weights(snapshot)
        except (SnapshotDamaged, FileNotFoundError) as error:
            # Damage in transit does not persist over retries. A snapshot that is damaged each time has another cause.
            # A snapshot that is gone was lost with the learner, which then raises LearnerLost when it is to publish.
            self._damaged += 1
            if self._damaged == TRIES:
                if isinstance(error, FileNotFoundError):
                    raise RunFailed(reason(error)) from error  # not an error of this machine's disk
                raise
            self._notice(f"{reason(error)}; the snapshot is published again")
            return
        self._damaged = 0
        self._gap = max((report.probe_gap for report in reports), default=None)
        self._versions.verified = version
        self.on_delivered(version)
