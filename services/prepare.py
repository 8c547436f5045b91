"""From a configuration to everything a run needs before a process is started: model, data, prompts, schedule, plan."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.process import available_memory_gib
from actors.types import IntArray
from learner.types import LearnerSettings
from services.config import RunConfig
from services.demonstrations import load_demonstrations, load_questions
from services.errors import PreflightError
from services.evaluation import LoadedSet
from services.load_config import check_files
from services.methods import loss_of, on_demonstrations, teacher_of
from services.models import resolve_model
from services.plan import Plan, engine_settings, make_plan, roles
from services.prompts import PromptBuilder, PromptPair, build_prompts, load_tokenizer
from services.schedule import Schedule, make_schedule
from services.shape import ModelShape
from services.sinks import check_sinks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 48
CHECKPOINT_BYTES_PER_PARAMETER = 20  # float32 masters, two moments, EMA, and the student in float32 at most


@dataclass(frozen=True)
class Prepared:
    """A run that has been checked as far as it can be without starting it."""

    config: RunConfig
    path: Path  # of the config file
    model: Path
    shape: ModelShape
    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[PromptPair]  # of the demonstrations, in file order
    sets: list[LoadedSet]
    schedule: Schedule
    plan: Plan
    fingerprint: str  # of whatever must not change between a run and its continuation

    @property
    def probe_ids(self) -> IntArray:
        """A real prompt's first tokens: what weight updates are verified on."""
        ids = max((p.teacher_ids or p.student_ids for p in self.prompts[:32]), key=len)
        return np.asarray(ids[:PROBE_TOKENS], dtype=np.int32)


def prepare(config: RunConfig, path: Path) -> Prepared:
    """Check everything; UserError lists what is wrong. Relative paths start at the config file's folder."""
    base = path.parent
    check_sinks(config.monitoring)
    check_files(config, base)
    demonstrations = load_demonstrations(config.data, base)
    questions = [(s, load_questions(s, base)) for s in config.evaluation.sets]
    model = resolve_model(config.model, base)
    for role in roles(config):
        engine_settings(config, model, role)  # raises when the model or the cache is too short for the prompts
    tokenizer = load_tokenizer(model)
    builder = PromptBuilder(tokenizer, config.data.template, base, config.data.system)
    limits = (config.data.max_prompt_tokens, config.data.max_teacher_prompt_tokens)
    reply = config.sampling.max_new_tokens if on_demonstrations(config) else None
    prompts = build_prompts(builder, demonstrations, *limits, reply)
    sets = [LoadedSet(s, q, build_prompts(builder, q, *limits)) for s, q in questions]
    t = config.training
    schedule = make_schedule(
        len(demonstrations), t.batch_size, config.sampling.generations, config.seed, t.epochs, t.steps
    )
    shape = ModelShape.of(model, config.learner.lora)
    return Prepared(
        config=config,
        path=path.resolve(),
        model=model,
        shape=shape,
        tokenizer=tokenizer,
        prompts=prompts,
        sets=sets,
        schedule=schedule,
        plan=make_plan(config, shape, max(len(p.student_ids) for p in prompts)),
        fingerprint=_fingerprint(config, model, prompts),
    )


def learner_settings(prepared: Prepared) -> LearnerSettings:
    """How the learner of a run is started."""
    c = prepared.config
    return LearnerSettings(
        model=str(prepared.model),
        dtype=c.dtype,
        device=c.device,
        seed=c.seed,
        total_steps=prepared.schedule.total_steps,
        config=c.learner,
        loss=loss_of(c),
        teacher=teacher_of(c),
    )


def check_memory(config: RunConfig, plan: Plan) -> None:
    """PreflightError if this machine's memory cannot hold the plan; on a running cluster Ray decides that."""
    free = available_memory_gib()
    if config.ray.running is None and config.device == "cpu" and plan.memory_gib > free:
        raise PreflightError(
            f"the run needs about {plan.memory_gib:.1f} GiB of memory and {free:.1f} GiB are free here; lower "
            f"actors.*.kv_cache_gib, set teacher.weights: live (one engine fewer), or use a smaller model"
        )


def check_disk(prepared: Prepared, run_dir: Path) -> None:
    """PreflightError if the disk of the run directory, which exists, cannot hold the checkpoints."""
    keep = prepared.config.checkpoint.keep + 1  # the newest is written before the oldest goes
    shape = prepared.shape
    trained = shape.adapters or shape.parameters
    needed = (trained * CHECKPOINT_BYTES_PER_PARAMETER + 4 * shape.adapted) * keep
    disk = shutil.disk_usage(run_dir).free
    if needed > disk:
        raise PreflightError(
            f"{run_dir}: {keep} checkpoints take up to {needed / 1e9:.1f} GB and {disk / 1e9:.1f} GB are free there; "
            f"free some, or choose another --run-dir"
        )


# Of a pool, what changes nothing that is computed.
LIMITS = ("start_timeout_s", "health_timeout_s", "drain_timeout_s", "max_restarts")
ELSEWHERE = (*LIMITS, "max_replicas", "cpus", "gpus", "labels")


def _fingerprint(config: RunConfig, model: Path, prompts: list[PromptPair]) -> str:
    """Settings that change the result, the kind of model, and the very tokens that are trained on.

    No paths: a run may be continued after its files were moved.
    """
    elsewhere = {"model", "data", "run_dir", "ray", "monitoring", "checkpoint", "evaluation"}
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
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update((model / "config.json").read_bytes())
    for pair in prompts:
        digest.update(json.dumps([pair.student_ids, pair.teacher_ids, pair.demonstration_ids]).encode())
    return digest.hexdigest()
