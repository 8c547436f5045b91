"""What runs on which device: engines, learner, and the way of the weights between them."""

from typing import TYPE_CHECKING

from sdft.actors.config import VLLM

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig


def check(run: "RunConfig") -> None:
    """Raise ValueError, with the mend, unless the devices can do what the sections ask for."""
    for each in (_sleep, _transport, _split, _state, _graphs, _shared, _ranks):
        each(run)


def _sleep(run: "RunConfig") -> None:
    """Engines that sleep."""
    for name, pool in run.actors.pools.items():
        if not pool.sleep:
            continue
        why = {
            "needs device: cuda, because it frees memory of a GPU": run.device == "cpu",
            f"needs training.max_staleness 0, because with {run.training.max_staleness} the engines compute while "
            f"the learner steps": not run.strict,
            f"works with vLLM's engines only, and actors.{name}.engine is {pool.engine}": pool.engine != VLLM,
        }
        if reason := next((text for text, holds in why.items() if holds), None):
            raise ValueError(f"actors.{name}.sleep {reason}; remove it")


def _transport(run: "RunConfig") -> None:
    """The weight transport."""
    own = [name for name, pool in run.actors.pools.items() if pool.engine != VLLM]
    if run.weights.transport == "ipc" and run.device == "cpu":
        raise ValueError(
            "weights.transport ipc passes memory of the learner's GPU, and device is cpu; set it to memory or "
            "broadcast, or set device: cuda"
        )
    if run.weights.transport == "ipc" and own:
        raise ValueError(
            f"weights.transport ipc works with vLLM's engines only, and actors.{own[0]}.engine is a class of your "
            f"own; set it to memory, or remove engine"
        )


def _split(run: "RunConfig") -> None:
    """Engines that are split."""
    split = {f"actors.{name}": pool for name, pool in run.actors.pools.items() if pool.tensor_parallel > 1}
    for place, pool in split.items():
        if run.device == "cuda" and pool.gpus != 1:
            raise ValueError(
                f"{place}.gpus {pool.gpus:g} is not possible with {place}.tensor_parallel {pool.tensor_parallel}, "
                f"because each part of an engine has a whole GPU; remove gpus"
            )
        if run.weights.transport in ("broadcast", "ipc"):
            raise ValueError(
                f"weights.transport {run.weights.transport} sends to engines that are whole, and "
                f"{place}.tensor_parallel is {pool.tensor_parallel}; set weights.transport: memory, or "
                f"tensor_parallel: 1"
            )


def _state(run: "RunConfig") -> None:
    """The state of the learner."""
    if run.dtype == "bfloat16" and run.learner.zero_stage == 0:
        raise ValueError(
            "learner.zero_stage 0 keeps no float32 masters of bfloat16 weights; set it to 1 (the same cost on "
            "one rank) or dtype to float32"
        )
    if not run.learner.deterministic and run.device == "cpu":
        raise ValueError("learner.deterministic false saves nothing with device: cpu; remove it")
    if run.learner.overlap and run.device == "cpu":
        raise ValueError(
            "learner.overlap lets a GPU compute while gradients are sent, and with device: cpu the same cores do both; "
            "remove it"
        )
    if run.learner.offload and run.device == "cpu":
        raise ValueError(
            "learner.offload keeps the optimizer's state in the host's memory, where device: cpu keeps it too; "
            "remove it"
        )


def _graphs(run: "RunConfig") -> None:
    """CUDA graphs."""
    engines = {f"actors.{name}": pool.execution for name, pool in run.actors.pools.items()}
    if run.service is not None:
        engines["service.serving"] = run.service.serving.execution
    for place, execution in engines.items():
        if execution == "graphs" and run.device == "cpu":
            raise ValueError(
                f"{place}.execution graphs means CUDA graphs, and device is cpu; set it to eager or compiled"
            )


def _shared(run: "RunConfig") -> None:
    """Engines that share a GPU."""
    for name, pool in run.actors.pools.items() if run.device == "cuda" else ():
        if pool.gpus % 1 and pool.kv_cache_gib is None:
            raise ValueError(
                f"actors.{name}.gpus {pool.gpus:g} lets several processes share a GPU, so that an engine cannot "
                f"measure its free memory; set actors.{name}.kv_cache_gib"
            )


def _ranks(run: "RunConfig") -> None:
    """Each rank has work."""
    rollouts = min(run.training.batch_size * task.sampling.generations for task in run.tasks)
    groups = run.learner.ranks // run.learner.sequence_parallel
    if groups > rollouts:
        each = f" / learner.sequence_parallel {run.learner.sequence_parallel}" * (groups < run.learner.ranks)
        raise ValueError(
            f"learner.ranks {run.learner.ranks}{each} must not exceed the {rollouts} rollouts of a step "
            f"(training.batch_size times sampling.generations), or some ranks have no work"
        )
