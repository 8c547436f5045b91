"""The fingerprint of a run: settings, model and tokens that must not change on resume."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdft.actors.config import VLLM
from sdft.services.config.run import TaskConfig
from sdft.services.data.pairs import PromptPair
from sdft.services.planning.plan import execution, pools

# Settings of a strict run's pool that do not affect the results.
LIMITS_OF_POOL = ("start_timeout_s", "health_timeout_s", "drain_timeout_s", "max_restarts")
NOT_HASHED_OF_POOL = (*LIMITS_OF_POOL, "max_replicas", "cpus", "gpus", "labels")
SHARE_BEFORE = 0.4  # gpu_memory_utilization
# Settings of a method and of its divergence, with the value that is not hashed: runs that began when there were none
# can be resumed.
OFF_OF_METHOD: Mapping[str, object] = {"entropy": 0, "length": None}
OFF_OF_DIVERGENCE: Mapping[str, object] = {"clip": None, "support": "teacher"}


def fingerprint_of(before: str, config: TaskConfig, model: bytes, prompts: Sequence[PromptPair]) -> str:
    """Hash the settings that change the result, the model and the training tokens, up to and including this task.

    before: the fingerprint of the previous task. model: bytes that identify the models. prompts: of all records; none
    of a source that grows, whose trained prefix is compared instead (prefix.py). Paths are not hashed, so a run can be
    resumed after its files were moved. Returns a SHA-256 hex digest.
    """
    not_hashed = {"model", "data", "stages", "run_dir", "ray", "monitoring", "checkpoint", "evaluation", "retention"}
    settings = config.model_dump(mode="json", exclude=not_hashed)
    settings["method"] = hashed_method(settings["method"])
    for key in ("model", "models"):  # external ones are in `model`, and the route of a record in its prompts
        del settings["teacher"][key]
    if config.teacher.temperature == 1:  # runs that began when it was always 1 can be resumed
        del settings["teacher"]["temperature"]
    if config.teacher.weights == "gated":  # what the guard finds decides on the weights
        settings["gate"] = _gate(config)
    else:  # runs that began before there was a gate can be resumed
        del settings["teacher"]["refresh_every"]
    if settings["environment"] is None:  # runs that began before there were environments can be resumed
        del settings["environment"]
    else:
        for key in ("processes", "concurrent", "python"):
            del settings["environment"][key]
    if config.strict:
        del settings["actors"]["batch_timeout_s"]
        started = {config.actors.entry(name) for name in pools(config)}
        for name, pool in config.actors.pools.items():
            of_pool = settings["actors"].pop(name)
            if not config.actors.role(name).trains:
                continue
            for key in ("role", "sleep"):
                del of_pool[key]
            # As it is executed, so that null and its value are the same.
            of_pool["execution"] = execution(pool.execution, config.device)
            if pool.gpu_memory_utilization is None:  # runs that began when the default was a number can be resumed
                of_pool["gpu_memory_utilization"] = SHARE_BEFORE
            if config.device == "cpu":  # runs that began when the setting was enforce_eager can be resumed
                of_pool["enforce_eager"] = of_pool.pop("execution") == "eager"
            if pool.engine == VLLM:  # runs that began when vLLM was the only engine can be resumed
                del of_pool["engine"]
            if pool.tensor_parallel == 1:  # runs that began when engines were not split can be resumed
                del of_pool["tensor_parallel"]
            for key in NOT_HASHED_OF_POOL if name in started else ():
                del of_pool[key]
            settings["actors"][name] = of_pool
    else:  # a run ahead is not reproducible, whatever its engines are
        del settings["actors"]
        settings["training"]["max_staleness"] = "some"
    # The other settings of these sections change how the result is computed, not what it is.
    settings["weights"] = {key: settings["weights"][key] for key in ("sync_every", "teacher_sync_every")}
    settings["learner"] = {key: settings["learner"][key] for key in ("optimizer", "lora")}
    if config.data.grows and config.learner.optimizer.schedule == "constant":
        # The number of steps only says when the run ends, so that it may be raised when the run is continued.
        steps, optimizer = settings["training"].pop("steps"), settings["learner"]["optimizer"]
        if steps is not None:
            optimizer["warmup_steps"] = min(optimizer["warmup_steps"], max(0, steps - 1))  # as learning_rate() does
    variables = [config.data.student_variables, config.data.teacher_variables]
    if any(variables):  # also where they change no token of the known prompts; runs without them keep their digest
        settings["chat_template_kwargs"] = variables
    digest = hashlib.sha256(before.encode() + json.dumps(settings, sort_keys=True).encode())
    digest.update(model)
    for pair in prompts:
        digest.update(pair.encoded)
    return digest.hexdigest()


def hashed_method(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings as they are hashed: without those that are off."""
    hashed = _without(method, OFF_OF_METHOD)
    if isinstance(hashed.get("divergence"), Mapping):
        hashed["divergence"] = _without(hashed["divergence"], OFF_OF_DIVERGENCE)
    return hashed


def _without(settings: Mapping[str, Any], off: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in off or value != off[key]}


def _gate(config: TaskConfig) -> list[Any]:
    """Return the settings of the guard that a gated teacher depends on: of detectors, and of guarded sets."""
    assert config.retention is not None
    of_set = {"name", "grader", "rows", "max_new_tokens"}
    if config.retention.max_drop_pass_at is not None:
        of_set |= {"pass_at", "pass_samples", "pass_temperature"}
    sets = [s.model_dump(mode="json", include=of_set) for s in config.evaluation.sets if s.name in config.guarded]
    guard = config.retention.model_dump(mode="json", exclude={"action"})
    # Runs that began before there were these can be resumed.
    guard = _without(guard, {"max_drop_pass_at": None})
    if guard["detectors"] is not None:
        guard["detectors"] = _without(guard["detectors"], {"phrases": []})
    return [guard, config.guarded, sets, config.evaluation.every if config.guarded else None]
