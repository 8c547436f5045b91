"""Nodes of the Ray cluster that are about to go: a preemption notice, or the autoscaler's drain."""

import ray

EVERY_S = 5.0


def draining() -> set[str]:
    """Ids of the nodes that take nothing new, and will end."""
    # Ray's own libraries (Train, Serve) ask the same; there is no public call for it in 2.60.
    return set(ray._private.state.state.get_draining_nodes())
