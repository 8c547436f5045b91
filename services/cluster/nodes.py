"""Nodes of the Ray cluster that a run requests from an autoscaler."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from sdft.services.cluster.compat import Coordinator
from sdft.services.cluster.queries import ANSWER_S, FAILURES
from sdft.services.planning.plan import Plan

EVERY_S = 5.0  # between two queries
LASTS_S = 60.0  # a request expires if it is not renewed for so long


class NodeRequest:
    """A run's request for resources to Ray's autoscaler.

    For actors that wait for a place the autoscaler grows at its own pace; this requests all resources of the run at
    once.
    """

    def __init__(self, requester: str, plan: Plan) -> None:
        """requester: a request replaces the earlier one of the same requester."""
        self._requester, self._plan = requester, plan
        self._coordinator = Coordinator()

    def renew(self, engines: Mapping[str, int], lasts_s: float = LASTS_S) -> None:
        """Request resources for the learner and `engines` (pool to number), for lasts_s; returns at once."""
        pools = self._plan.pools
        parts = [*self._plan.learners, *(pools[name][0] for name, size in engines.items() for _ in range(size))]
        bundles, labels = [part.bundle for part in parts], [dict(part.labels) for part in parts]
        self._coordinator.request(self._requester, bundles, labels, lasts_s)

    def withdraw(self) -> None:
        """Cancel the request. If that fails, the request expires by itself."""
        with suppress(*FAILURES):
            self._coordinator.cancel(self._requester, ANSWER_S)


@contextmanager
def requested(requester: str, plan: Plan, wait_s: float) -> Iterator[NodeRequest]:
    """Request resources for the plan, the first time for wait_s + LASTS_S; withdraw the request at the end."""
    request = NodeRequest(requester, plan)
    request.renew({name: len(parts) for name, parts in plan.pools.items()}, wait_s + LASTS_S)
    try:
        yield request
    finally:
        request.withdraw()
