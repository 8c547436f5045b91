"""Watches nodes for the pools: engines leave nodes that are drained, and the request for nodes is renewed."""

import asyncio
from collections.abc import Callable, Mapping

from sdft.services.cluster.compat import draining_nodes
from sdft.services.cluster.nodes import EVERY_S, NodeRequest
from sdft.services.cluster.queries import Outage, Query
from sdft.services.fleet.pool import EnginePool


async def watch_nodes(
    pools: Mapping[str, EnginePool],
    request: NodeRequest | None,
    notice: Callable[[str], None],
    drained: Callable[[], set[str]] = draining_nodes,
    every_s: float = EVERY_S,
) -> None:
    """Let engines leave nodes that are being drained, and renew the request to the autoscaler, until cancelled.

    Both are advisory: a cluster that does not answer for a while does not end the run.
    """
    query = Query(drained)
    draining_fails = Outage("the query for nodes that are being drained", notice)
    renewal_fails = Outage("the request for nodes to Ray's autoscaler", notice)
    moving = [pool for pool in pools.values() if not pool.settings.strict]
    while True:
        if moving:
            with draining_fails.tolerated():
                nodes = await query.answer()
                for pool in moving if nodes else ():
                    pool.vacate(nodes)
        if request is not None:
            with renewal_fails.tolerated():
                request.renew({name: pool.size for name, pool in pools.items()})
        await asyncio.sleep(every_s)
