"""The fingerprint of a run: settings, model and tokens that must not change when it is continued."""

import hashlib
import json

from sdft.services.config.run import TaskConfig
from sdft.services.data.contexts import (
    PromptPair,
)
from sdft.services.planning.plan import roles

# Of a pool, what changes nothing that is computed.
LIMITS = ("start_timeout_s", "health_timeout_s", "drain_timeout_s", "max_restarts")
ELSEWHERE = (*LIMITS, "max_replicas", "cpus", "gpus", "labels")


def fingerprint_of(before: str, config: TaskConfig, model: bytes, prompts: list[PromptPair]) -> str:
    """Settings that change the result, the model, and the very tokens that are trained on, up to this task.

    before: that of the task before it. model: what tells it from others. No paths: a run may be continued after its
    files were moved.
    """
    elsewhere = {"model", "data", "stages", "run_dir", "ray", "monitoring", "checkpoint", "evaluation", "retention"}
    settings = config.model_dump(mode="json", exclude=elsewhere)
    if config.strict:
        for role in roles(config):
            for key in ELSEWHERE:
                del settings["actors"][role][key]
    else:  # no two runs are the same, whatever engines there are
        del settings["actors"]
        settings["training"]["max_staleness"] = "some"
    # The rest of these changes how it is computed, not what.
    settings["weights"] = {key: settings["weights"][key] for key in ("sync_every", "teacher_sync_every")}
    settings["learner"] = {key: settings["learner"][key] for key in ("optimizer", "lora")}
    digest = hashlib.sha256(before.encode() + json.dumps(settings, sort_keys=True).encode())
    digest.update(model)
    for pair in prompts:
        digest.update(json.dumps([pair.student_ids, pair.teacher_ids, pair.demonstration_ids]).encode())
    return digest.hexdigest()
