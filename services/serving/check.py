"""What is checked before a service starts: its settings, the model, the evaluation sets and the plan, as for a run."""

import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sdft.actors.config import VLLM, EngineSettings
from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file
from sdft.services.config.run import RunConfig
from sdft.services.config.service import HttpConfig, ServiceConfig
from sdft.services.planning.plan import engine_settings as of_pool
from sdft.services.planning.plan import execution, max_probe_gap
from sdft.services.planning.prepare import prepare
from sdft.services.planning.prepared import Prepared
from sdft.services.records.run_dir import RUN_FILES
from sdft.services.releases.gate import worse
from sdft.services.serving.feedback import trained_kinds
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.window import EARLIER, NEW, window_run

SAMPLE_ROW = {"id": "sample", "prompt": "Hi", "demonstration": "Hi", "context": "Hi", "feedback": "Hi"}
# Settings of a pool that its engines have, and the engine of a service in turns has from service.serving.
OF_ENGINE = (
    "replicas",
    "max_replicas",
    "kv_cache_gib",
    "threads",
    "max_num_seqs",
    "execution",
    "gpu_memory_utilization",
    "gpus",
    "tensor_parallel",
    "labels",
)
OF_A_RUN = (*(name for name in RUN_FILES if name != "config.yaml"), "checkpoints")


@dataclass(frozen=True)
class Checked:
    """A service that can start."""

    config: RunConfig  # with absolute paths
    prepared: Prepared  # as a run on one sample row
    folder: ServiceFolder

    @property
    def settings(self) -> ServiceConfig:
        assert self.config.service is not None
        return self.config.service


def check_service(config: RunConfig, folder: ServiceFolder) -> Checked:
    """Check a service before it starts. Raises UserError. Makes the folder.

    config: with absolute paths.
    """
    if config.service is None:
        raise UserError(f"{folder.config}: it has no section service; add `service: {{}}`, which sets the defaults")
    _check_settings(config)
    trained_kinds(config)
    if not folder.journal.exists() and (found := next((n for n in OF_A_RUN if (folder.path / n).exists()), None)):
        raise UserError(
            f"{folder.path} holds a run ({found}); name another --run-dir, or serve that run on: sdft serve "
            f"{folder.path}"
        )
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.engines.mkdir(exist_ok=True)
        sample = folder.path / "sample.jsonl"
        sample.write_text(json.dumps(SAMPLE_ROW) + "\n")
    except OSError as error:
        raise UserError(f"{folder.path} cannot be written ({error.strerror}); name another folder") from None
    _check_tls(config.service.http, folder.path)
    prepared = prepare(window_run(config, config.model, str(sample)), folder.config)
    shape = json.loads((prepared.model / "config.json").read_text())
    limit, wanted = shape.get("max_position_embeddings"), config.service.serving.max_model_len
    if limit is not None and wanted > limit:
        raise UserError(
            f"service.serving.max_model_len is {wanted}, but the model in {prepared.model} has {limit} positions; "
            f"lower it"
        )
    return Checked(config, prepared, folder)


def warnings(checked: Checked) -> Iterator[str]:
    """Yield what a person should know before the service runs."""
    gate = checked.settings.gate
    large = [s for s in checked.prepared.sets if worse(len(s.questions), 0, 0, gate.max_drop) < gate.promote_below]
    if not large:
        enough = next(n for n in range(1, 10**6) if worse(n, 0, 0, gate.max_drop) < gate.promote_below)
        yield (
            f"no evaluation set has the {enough} questions that the gate needs to compare two releases, so candidates "
            f"are held until the held-out records are as many; add a set to evaluation.sets"
        )


def engine_settings(checked: Checked, model: Path) -> EngineSettings:
    """Return the settings of an engine that serves the release in the folder `model`."""
    config, serving = checked.config, checked.settings.serving
    longest, logprobs = serving.max_model_len, 20  # what OpenAI's API allows
    if serving.turns:
        run = checked.prepared.config
        of_pools = [of_pool(run, model, pool, checked.prepared.vocabulary) for pool in run.actors.pools]
        longest = max(longest, *(s.max_model_len for s in of_pools))
        logprobs = max(logprobs, *(s.max_logprobs for s in of_pools))
    return EngineSettings(
        model=str(model),
        dtype=config.dtype,
        device=config.device,
        max_model_len=longest,
        max_logprobs=logprobs,
        max_num_seqs=serving.max_num_seqs,
        hold_batches=serving.turns and config.strict,  # those of windows; a request of a user is no batch
        share_prompts=False,
        gpu_memory_utilization=serving.gpu_memory_utilization,
        execution=execution(serving.execution, config.device),
        max_probe_gap=max_probe_gap(config),
        threads=serving.threads,
        kv_cache_gib=serving.kv_cache_gib or (None if config.device == "cuda" else 1),
        stop_ids=checked.prepared.stop_ids,
        serves=True,
        keep_experts=serving.turns and checked.prepared.replays_experts,
        shared=serving.turns,
        vocabulary=checked.prepared.vocabulary,
    )


def _check_settings(config: RunConfig) -> None:
    if config.service is not None and config.service.serving.cluster is not None and not config.ray.running:
        raise UserError(
            "service.serving.cluster: there is no address of a cluster; set ray.address, or submit the service with "
            "`sdft submit --serve`, or remove the key for engines on this machine"
        )
    if config.service is not None and config.service.serving.turns:
        _check_turns(config)
    if config.data is not None and (config.data.format != "messages" or config.data.columns):
        raise UserError("data.format and data.columns are of a file; a service takes rows in our columns; remove them")
    if config.teacher.models:
        raise UserError("teacher.models: what a service is taught names no teacher; set teacher.model instead")
    if config.environment is not None or config.method.needs_success:
        key = "environment" if config.environment is not None else f"method: {config.method.type}"
        raise UserError(f"{key}: a service learns from what it is taught, and not from episodes; remove it")
    for s in config.sets:
        if s.grader == "environment":
            raise UserError(f"evaluation.sets ({s.name}): the gate compares single replies; choose another grader")
        if s.name in (NEW, EARLIER):
            raise UserError(f"evaluation.sets: {s.name} is the set of held-out records; choose another name")
        if s.is_text:
            raise UserError(
                f"evaluation.sets ({s.name}): the gate compares answers, and grader perplexity has none; remove the set"
            )


def _check_turns(config: RunConfig) -> None:
    """Raise UserError if one engine cannot do what the windows and the users need."""
    s, own = config.sampling, [name for name, pool in config.actors.pools.items() if pool.engine != VLLM]
    for name, pool in config.actors.pools.items():
        for key in OF_ENGINE:
            if getattr(pool, key) != type(pool).model_fields[key].default:
                raise UserError(
                    f"service.serving.turns is true, so windows start no engines, and actors.{name}.{key} has no "
                    f"effect; remove it, or set turns: false"
                )
    for wrong, what, mend in (
        ((s.temperature, s.top_p) != (1, 1), "sampling", "users get plain log-probs; set temperature and top_p to 1"),
        (config.teacher.weights == "external", "teacher.weights: external", "it would hold another model"),
        (config.weights.transport != "memory", "weights.transport", "set it to memory"),
        (config.ray.running, "ray.address", "the engine is on this machine; remove it"),
        (bool(own), f"actors.{own[0]}.engine" if own else "", "remove it"),
    ):
        if wrong:
            raise UserError(
                f"service.serving.turns is true, and one engine cannot do that with {what}: {mend}; or set turns: false"
            )


def _check_tls(http: HttpConfig, base: Path) -> None:
    if http.tls_certificate is None or http.tls_key is None:
        return
    certificate = existing_file("service.http.tls_certificate", http.tls_certificate, base)
    key = existing_file("service.http.tls_key", http.tls_key, base)
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except OSError as error:  # SSLError is one
        raise UserError(f"service.http: {certificate} and {key} are no certificate with its key ({error})") from None
