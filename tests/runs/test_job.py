"""Runs as jobs of a running Ray cluster, in float32 with LoRA: killed and submitted again, or refused.

Cluster and jobs use the built wheel. The runs that they are compared with use the checkout.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from sdft.services.records.batches import read_batch
from sdft.services.records.rows import read_jsonl
from sdft.services.serving.tokens import SCOPES, add_token
from tests.fakes.rollouts import logprobs
from tests.fakes.tiny import TOKENS, make_tiny_model
from tests.papers.documents import ROOT, commands
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import BIN, command, finish, free_port, metrics, replayed, wait_for_step, wait_until, write_run
from tests.runs.service import AskedService, demonstrations, write_service
from tests.runs.wheel import install_wheel

# The adapters begin with no change; this rate changes them noticeably within four steps.
LORA: dict[str, Any] = {"lora": {"rank": 4}, "optimizer": {"lr": 0.02, "warmup_steps": 2}}


@dataclass(frozen=True)
class Head:
    """A cluster of one node, started with `ray start --head`."""

    address: str  # of the cluster, for drivers
    dashboard: str  # for job submission
    environment: dict[str, str]  # for the commands of the cluster, with its token
    bin: Path  # folder of the cluster's commands


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    before = on_machine()
    bin = install_wheel(tmp_path_factory.mktemp("wheel"))
    port, dashboard, agent = free_port(), free_port(), free_port()  # another cluster may use Ray's default ports
    scratch = Path(tempfile.mkdtemp(prefix="head-"))  # short, because the paths of Ray's sockets begin with it
    ports = f"--port={port} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}"
    arguments = f"start --head --block --num-cpus=4 {ports} --temp-dir={scratch}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
    path = {"PATH": f"{bin}:{os.environ['PATH']}"}
    environment = os.environ | path | token | {"RAY_USAGE_STATS_ENABLED": "0"}
    with (scratch / "start.log").open("w") as log:
        ray = subprocess.Popen([bin / "ray", *arguments.split()], stdout=log, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{dashboard}"
        trial = [str(bin / "ray"), "job", "submit", "--address", url, "--", "true"]
        deadline = time.monotonic() + 120
        while subprocess.run(trial, env=environment, capture_output=True, timeout=120, check=False).returncode != 0:
            assert ray.poll() is None, (scratch / "start.log").read_text()
            assert time.monotonic() < deadline, f"the cluster at {url} took no job in 120 s"
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{port}", url, environment, bin)
    finally:
        ray.terminate()
        ray.wait(timeout=60)
        left = new_since(before)
        shutil.rmtree(scratch)
        assert left == set()


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run with LoRA that starts its own cluster."""
    folder = tmp_path_factory.mktemp("alone")
    finish(write_run(folder, tiny_model, "float32", **LORA), folder / "run")
    return folder / "run"


def test_the_export_of_a_run_with_lora_has_the_log_probs_that_its_engine_had(
    alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """The rollouts of step 5 were sampled with the weights of checkpoint 4."""
    out = tmp_path / "merged"
    subprocess.run([BIN / "sdft", "export", alone, "--step", "4", "--out", out], check=True, timeout=120)
    saved = alone / "checkpoints" / "step-000004" / "student"
    assert {p.name for p in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (saved / "model.safetensors").exists()
    gaps: dict[Path, list[float]] = {tiny_model: [], out: []}
    for path, found in gaps.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for sample in read_batch(alone, 5):
            (completion,) = sample.completions
            own = logprobs(model, sample.prompt_ids, completion, TOKENS).gather(
                1, torch.tensor(completion).long()[:, None]
            )
            found.append(np.abs(own[:, 0].numpy() - sample.logprobs[-len(completion) :]).max())
    assert max(gaps[out]) < 1e-4
    assert min(gaps[tiny_model]) > 1e-2, "adapters that change nothing would show nothing"


@pytest.mark.whole
def test_a_pool_that_trains_nothing_evaluates_to_the_same_bits(alone: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The evaluations and the steps equal those of the run whose student engines evaluate."""
    folder, held_out = tmp_path / "run", "actors.held_out={role: evaluation, kv_cache_gib: 0.05}"
    finish(write_run(tmp_path, tiny_model, "float32", **LORA), folder, held_out)
    assert {name: len(pids) for name, pids in json.loads((folder / "pids.json").read_text()).items()} == {
        "student": 1,
        "teacher": 1,
        "held_out": 1,
        "learner": 1,
    }
    for file in ("eval.jsonl", "samples.jsonl"):
        assert read_jsonl(folder / file) == read_jsonl(alone / file)
    assert metrics(folder) == metrics(alone)


def test_the_learner_alone_repeats_a_run_from_its_recorded_rollouts(alone: Path) -> None:
    """Bit for bit, from a checkpoint, including the learner states at the checkpoints."""
    result = replayed(alone, "--steps", "5:6")
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert "step 5: the same\n" in result.stdout
    assert "step 6: the same to the last bit of its state" in result.stdout


def test_a_job_that_was_killed_resumes_when_it_is_submitted_again(
    head: Head, alone: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """With the two commands of the documents. The result has the same bits as that of an uninterrupted local run.

    The user's project has packages with the names of this project's folders. Ray puts the user's project first on the
    path.
    """
    work, run_dir = tmp_path / "work", tmp_path / "shared" / "run"
    for name in ("services", "learner", "actors"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text(f"raise ImportError('this is the {name} of the user')\n")
    write_run(work, tiny_model, "float32", **LORA)
    (ray_job,) = [c for c in commands("ray", ROOT / "docs" / "cluster.md") if c[1] == "job"]
    (sdft_submit,) = [c for c in commands("sdft") if c[1] == "submit"]
    here = {"http://127.0.0.1:8265": head.dashboard, "my.yaml": "tiny.yaml", "/shared/runs/my": str(run_dir)}
    first = [str(head.bin / "ray"), "job", "submit", "--no-wait", *(here.get(word, word) for word in ray_job[3:])]
    result = subprocess.run(
        first, cwd=work, env=head.environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    wait_for_step(3, run_dir)
    os.kill(json.loads((run_dir / "run.json").read_text())["pid"], signal.SIGKILL)

    again = [str(head.bin / "sdft"), *(here.get(word, word) for word in sdft_submit[1:])]
    result = subprocess.run(
        again, cwd=work, env=head.environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "continuing after step 2" in result.stdout

    assert metrics(run_dir) == metrics(alone)
    assert read_jsonl(run_dir / "eval.jsonl") == read_jsonl(alone / "eval.jsonl")
    adapter = Path("checkpoints") / "step-000006" / "student" / "adapter_model.safetensors"
    assert (run_dir / adapter).read_bytes() == (alone / adapter).read_bytes()


def test_a_cluster_that_can_never_hold_the_run_is_named_with_what_is_missing(
    head: Head, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, tiny_model, "float32")
    large = command(config, tmp_path / "run", "actors.student.cpus=64", f"ray.address={head.address}")
    result = subprocess.run(large, env=head.environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 3
    assert (
        "needs 65 CPUs (student engine 0 64 CPUs, teacher engine 0 0.5 CPUs, learner rank 0 0.5 CPUs)" in result.stderr
    )
    assert "nodes have 4 CPUs" in result.stderr
    assert "no node has room for student engine 0" in result.stderr
    assert "Traceback" not in result.stderr


def test_submit_follow_reports_a_failed_job(head: Head, tiny_model: Path, tmp_path: Path) -> None:
    write_run(tmp_path, tiny_model, "float32")
    (tmp_path / "train.jsonl").write_text('{"prompt": "x"}\n')
    submit = ["submit", "tiny.yaml", "--address", head.dashboard, "--run-dir", str(tmp_path / "r"), "--follow"]
    result = subprocess.run(
        [head.bin / "sdft", *submit],
        cwd=tmp_path,
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 1
    assert "demonstration is missing" in result.stdout


@pytest.mark.whole
def test_a_service_as_a_job_has_its_engines_on_the_clusters_nodes(head: Head, tmp_path: Path) -> None:
    """It is taught through Ray Serve's proxies, trains on the cluster, and promotes. `ray job stop` ends all of it."""
    folder, work = tmp_path / "shared" / "service", tmp_path / "work"
    work.mkdir()
    serving, window = {"cluster": {"cpus": 0.5}}, {"epochs": 2}
    token, proxies = add_token(work / "tokens.json", "app", list(SCOPES)), free_port()
    http = {"host": "0.0.0.0", "port": 0, "tokens": "tokens.json", "proxies": {"port": proxies, "replicas": 1}}
    write_service(work, make_tiny_model(tmp_path / "model"), serving=serving, window=window, http=http)
    words = ["submit", "service.yaml", "--serve", "--address", head.dashboard, "--run-dir", str(folder)]

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=work, env=head.environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    job = run(head.bin / "sdft", *words).partition("submitted as ")[2].partition(";")[0]
    try:
        service = AskedService(folder)
        service.http.headers["Authorization"] = f"Bearer {token}"
        service.connect()
        (engine,) = service.get("status")["engines"]
        assert engine["place"] not in ("", "this machine")
        parent = psutil.Process(engine["pid"]).parent()
        assert parent is not None
        assert "EngineNode" in " ".join(parent.cmdline())
        assert service.ask("Say number 3.")[0] == 1
        wait_until(lambda: listens(proxies), "the proxies listen")
        service.http.base_url = f"http://127.0.0.1:{proxies}"
        service.post("demonstrations", demonstrations())
        assert service.decided(2)["status"] == "served"
        assert service.ask("Say number 3.")[0] == 2
        service.http.close()
    finally:
        run(head.bin / "ray", "job", "stop", "--address", head.dashboard, job)
    wait_until(lambda: not runs(engine["pid"]), "the engine ends with its service")
    assert not (folder / "service.json").exists()


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE  # whose parent has not noticed its end
    except psutil.NoSuchProcess:
        return False
