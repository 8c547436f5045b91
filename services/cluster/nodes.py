"""Nodes of the Ray cluster: those that are about to go, and those that a run wants of an autoscaler."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray

from sdft.services.cluster.queries import ANSWER_S, FAILURES
from sdft.services.planning.plan import Plan

EVERY_S = 5.0  # between two looks
LASTS_S = 60.0  # what was asked for and not renewed since is withdrawn


def draining() -> set[str]:
    """Ids of the nodes that take nothing new, and will end: a preemption notice, or the autoscaler's drain."""
    # Ray's own libraries (Train, Serve) ask the same; there is no public call for it in 2.60.
    return set(ray._private.state.state.get_draining_nodes())


class NodeRequest:
    """Room that the cluster is to have for a run, as Ray's autoscaler is told through its SDK.

    For actors that wait for a place it grows as fast as it likes to; this says at once what the run is to have in all.
    The SDK keeps one request for the whole cluster, for ever. So Ray's own libraries (Data, Train) put an actor before
    it that adds up what each of them asks for, and forgets what was not renewed. This asks that actor.
    """

    def __init__(self, requester: str, plan: Plan) -> None:
        """requester: the same one replaces what it asked for before."""
        # Here: a second of imports that no other run needs.
        from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator

        self._requester, self._plan = requester, plan
        self._coordinator: Any = coordinator.get_or_create_autoscaling_coordinator()

    def renew(self, engines: Mapping[str, int], lasts_s: float = LASTS_S) -> None:
        """Ask for the learner and so many engines of each role; returns at once."""
        pools = {"student": self._plan.students, "teacher": self._plan.teachers}
        parts = [*self._plan.learners, *(pools[role][0] for role, size in engines.items() for _ in range(size))]
        self._coordinator.request_resources.remote(
            requester_id=self._requester,
            resources=[part.bundle for part in parts],
            label_selectors=[dict(part.labels) for part in parts],
            expire_after_s=lasts_s,
        )

    def withdraw(self) -> None:
        """Ask for nothing any more. If that fails, the request expires by itself."""
        with suppress(*FAILURES):
            ray.get(self._coordinator.cancel_request.remote(self._requester), timeout=ANSWER_S)


@contextmanager
def requested(requester: str, plan: Plan, wait_s: float) -> Iterator[NodeRequest]:
    """Room for the plan is asked for, first for as long as it may take to come; withdrawn at the end."""
    request = NodeRequest(requester, plan)
    request.renew({"student": len(plan.students), "teacher": len(plan.teachers)}, wait_s + LASTS_S)
    try:
        yield request
    finally:
        request.withdraw()
