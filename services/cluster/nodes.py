"""Nodes of the Ray cluster: those that are being drained, and those that a run requests from an autoscaler."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray

from sdft.services.cluster.queries import ANSWER_S, FAILURES
from sdft.services.planning.plan import Plan

EVERY_S = 5.0  # between two queries
LASTS_S = 60.0  # a request expires if it is not renewed for so long


def draining() -> set[str]:
    """Return the ids of the nodes that take no new work and will end: a preemption notice, or an autoscaler's drain."""
    # Ray's own libraries (Train, Serve) use this private call; Ray 2.60 has no public one.
    return set(ray._private.state.state.get_draining_nodes())


class NodeRequest:
    """A run's request for resources to Ray's autoscaler.

    For actors that wait for a place the autoscaler grows at its own pace; this requests all resources of the run at
    once. The autoscaler's SDK keeps one request for the whole cluster, without expiry. Ray's own libraries (Data,
    Train) therefore use a coordinator actor, which adds up the requests of all requesters and drops those that are not
    renewed. This class sends its request to that actor.
    """

    def __init__(self, requester: str, plan: Plan) -> None:
        """requester: a request replaces the earlier one of the same requester."""
        # Imported here: it takes a second, and other runs do not need it.
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

        self._requester, self._plan = requester, plan
        self._coordinator: Any = coordinator.get_or_create_autoscaling_coordinator()

    def renew(self, engines: Mapping[str, int], lasts_s: float = LASTS_S) -> None:
        """Request resources for the learner and `engines` (role to number), for lasts_s; returns at once."""
        pools = {"student": self._plan.students, "teacher": self._plan.teachers}
        parts = [*self._plan.learners, *(pools[role][0] for role, size in engines.items() for _ in range(size))]
        self._coordinator.request_resources.remote(
            requester_id=self._requester,
            resources=[part.bundle for part in parts],
            label_selectors=[dict(part.labels) for part in parts],
            expire_after_s=lasts_s,
        )

    def withdraw(self) -> None:
        """Cancel the request. If that fails, the request expires by itself."""
        with suppress(*FAILURES):
            ray.get(self._coordinator.cancel_request.remote(self._requester), timeout=ANSWER_S)


@contextmanager
def requested(requester: str, plan: Plan, wait_s: float) -> Iterator[NodeRequest]:
    """Request resources for the plan, the first time for wait_s + LASTS_S; withdraw the request at the end."""
    request = NodeRequest(requester, plan)
    request.renew({"student": len(plan.students), "teacher": len(plan.teachers)}, wait_s + LASTS_S)
    try:
        yield request
    finally:
        request.withdraw()
