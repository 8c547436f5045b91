"""Builds a pool of engines in Ray actors from the configuration."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from sdft.actors.remote import Remote, RemoteActor
from sdft.actors.transport.named import transport_class
from sdft.actors.transport.protocol import Learner
from sdft.actors.worker import EngineWorker
from sdft.services.cluster.cluster import free, labelled, needs
from sdft.services.config.run import RunConfig
from sdft.services.fleet.engine import Patience
from sdft.services.fleet.pool import EnginePool, PoolSettings
from sdft.services.planning.plan import engine_settings


def engine_pool(
    config: RunConfig,
    model: Path,
    stop_ids: tuple[int, ...],
    vocabulary: int,
    name: str,
    options: Sequence[dict[str, Any]],
    notice: Callable[[str], None],
    learner: Callable[[], Learner],
    keep_experts: bool = False,
) -> EnginePool:
    """Return the pool with this name in the configuration. It is not started.

    stop_ids: tokens at which the engines stop. vocabulary: number of the tokenizer's tokens.
    options: Ray actor options of the first engines, whose places are reserved. Later engines request the same
    resources on any node with the labels.
    learner(): returns the current learner, which publishes the weights. keep_experts: rollouts have the experts that
    the engines chose.
    """
    e, role = config.actors.settings(name), config.actors.role_name(name)
    transport = config.weights.transport
    settings = replace(
        engine_settings(config, model, name, vocabulary),
        stop_ids=stop_ids,
        transport=transport,
        pool=name,
        keep_experts=keep_experts,
        sleeps=e.sleep,
    )
    actor = ray.remote(EngineWorker)
    gpus = e.gpus_of_engine if config.device == "cuda" else 0
    where = labelled(e.labels)
    anywhere: dict[str, Any] = {
        "num_cpus": e.cpus,
        "num_gpus": gpus,
        "label_selector": dict(e.labels),
        "max_restarts": 0,
    }

    def create(number: int) -> Remote:
        options_of_engine = options[number] if number < len(options) else anywhere
        return RemoteActor(actor.options(**options_of_engine).remote(settings))

    return EnginePool(
        PoolSettings(
            name=name,
            least=e.replicas,
            most=e.most,
            strict=config.strict,
            room=e.max_num_seqs,
            patience=Patience(e.start_timeout_s, e.health_timeout_s, e.max_restarts),
            batch_s=config.actors.batch_timeout_s,
            drain_s=e.drain_timeout_s,
            one_by_one=config.weights.swap == "one_by_one",
            sleeps=e.sleep,
        ),
        create,
        transport_class(transport)(role, learner, notice),
        notice,
        lambda: f"it needs one node{where} with {needs(e.cpus, gpus)} free; free in the cluster now: {free()}",
    )
