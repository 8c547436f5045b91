"""A run on a cluster that scales: Ray's autoscaler with nodes that are processes on this machine."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as CHANNEL

from sdft.services.config.dtype import native_dtype
from sdft.services.records.rows import read_jsonl
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import BIN, ENVIRONMENT, STOPPED, command, free_port, wait_for_step, wait_until, write_run

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"

# Evaluates expressions in one driver of the cluster: a new one takes seconds for each.
ANSWER = "answer: "
ASK = f"""
import json, sys, ray, ray.experimental.internal_kv
ray.init(address='auto', log_to_driver=False, logging_level='ERROR')
for expression in sys.stdin: print({ANSWER!r} + json.dumps(eval(expression)), flush=True)
"""


def with_environment(entry: str) -> list[int]:
    """Return the processes that started with this entry in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if entry.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def with_open_files(folder: Path) -> list[int]:
    """Return the processes with an open file in this folder: every process of a Ray cluster whose --temp-dir it is.

    Ray's agents overwrite their environment with their titles, so that with_environment does not find them. They
    outlive their raylet by a minute or more, while they try to reach a controller that has ended.
    """
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            for file in (process / "fd").iterdir():
                with suppress(FileNotFoundError):  # a file that has just been closed; the others still count
                    if file.readlink().is_relative_to(folder):
                        found.add(int(process.name))
    return sorted(found - {os.getpid()})


def is_raylet(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(os.readlink(f"/proc/{pid}/exe")).name == "raylet"
    return False


@dataclass(frozen=True)
class Growing:
    """A head with room for the first processes of a run, and up to two nodes with room for one more engine each."""

    address: str
    environment: dict[str, str]
    asked: subprocess.Popen[str]  # runs ASK

    def drain(self, node: str) -> None:
        """Announce that a node is about to be preempted."""
        words = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 300"
        command = [str(BIN / "ray"), "drain-node", "--address", self.address, "--node-id", node, *words.split()]
        subprocess.run(command, env=self.environment, check=True, capture_output=True, timeout=60)

    def kill(self, node: str) -> None:
        """Kill a node without notice."""
        (raylet,) = [pid for pid in with_environment(f"RAY_OVERRIDE_NODE_ID_FOR_TESTING={node}") if is_raylet(pid)]
        os.kill(raylet, signal.SIGKILL)

    def nodes(self) -> list[str]:
        """Return the ids of the live nodes, without the head."""
        rows = self._ask("[[n['NodeID'], n['Alive']] for n in ray.nodes()]")
        return [node for node, alive in rows if alive and node != HEAD_ID]

    def requested(self) -> list[dict[str, float]]:
        """Return the resources requested from the autoscaler through its SDK."""
        told = self._ask(f"str(ray.experimental.internal_kv._internal_kv_get({CHANNEL!r}) or b'[]', 'ascii')")
        return json.loads(told)

    def _ask(self, expression: str) -> Any:
        assert self.asked.stdin is not None
        assert self.asked.stdout is not None
        print(expression, file=self.asked.stdin, flush=True)
        while not (line := self.asked.stdout.readline()).startswith(ANSWER):
            assert line, f"the process that asks the cluster has ended: {self.asked.wait()}"
        return json.loads(line.removeprefix(ANSWER))


@pytest.fixture
def growing() -> Iterator[Growing]:
    before = on_machine()
    scratch = Path(tempfile.mkdtemp(prefix="grow-"))
    port = free_port()
    kinds = {
        "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
        "engine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    settings = {
        "cluster_name": "grow",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        },
        "auth": {"ssh_user": "root"},
        "docker": {},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{kind}_commands": [] for kind in ("initialization", "setup", "head_setup", "worker_setup")}
    settings |= {"head_start_ray_commands": [], "worker_start_ray_commands": []}
    (scratch / "cluster.yaml").write_text(json.dumps(settings))
    environment = ENVIRONMENT | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_health_check_period_ms": "1000",  # a lost node is detected after five checks
        "RAY_enable_autoscaler_v2": "0",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "1" * 64,
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "TMPDIR": str(scratch),  # on a real node, temporary files are lost with the node
    }
    start = ["start", "--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    start += [f"--autoscaling-config={scratch / 'cluster.yaml'}", f"--temp-dir={scratch}"]
    with (scratch / "start.log").open("w") as log:
        head = subprocess.Popen([BIN / "ray", *start], stdout=log, stderr=log, env=environment)
    try:
        wait_until(lambda: "Ray runtime started" in (scratch / "start.log").read_text(), "the head was up", head)
        ask = [str(BIN / "python"), "-c", ASK]
        with subprocess.Popen(ask, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asked:
            yield Growing(f"127.0.0.1:{port}", environment, asked)
            asked.kill()
    finally:
        # The head and the nodes that the autoscaler started. A regular stop of Ray takes half a minute.
        head.kill()
        head.wait(timeout=60)
        deadline = time.monotonic() + 60
        while (pids := with_open_files(scratch)) and time.monotonic() < deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        left = new_since(before)
        shutil.rmtree(scratch)
        assert left == set()


@pytest.mark.whole
def test_a_pool_grows_leaves_a_drained_node_and_loses_a_killed_one_without_losing_a_sample(
    growing: Growing, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_run(tmp_path, tiny_model, native_dtype("cpu"))
    run_dir, log = tmp_path / "run", tmp_path / "run.log"
    overrides = (
        "weights.transport=changes",
        "learner.optimizer.lr=1e-6",  # a step then changes 2 % of the weights
        "sampling.max_new_tokens=40",
        "training.batch_size=16",
        "training.steps=1000",
        "training.max_staleness=2",
        "actors.student.max_replicas=2",
        "actors.student.cpus=1",
        "actors.student.max_num_seqs=4",
        "evaluation.sets=[]",
        "ray.autoscaling=true",
    )
    with log.open("wb") as out:
        driver = subprocess.Popen(command(config, run_dir, *overrides), stdout=out, stderr=out, env=growing.environment)

    def until_said(text: str) -> None:
        wait_until(lambda: text in log.read_text(errors="replace"), f"the run had said {text!r}", driver)

    def until_more(steps: int) -> None:
        wait_for_step(len(read_jsonl(run_dir / "metrics.jsonl")) + steps, run_dir, driver)

    try:
        until_said("student engine 1 has joined")  # its weights come from a learner on another node, and are verified
        engine, other = {"CPU": 1}, {"CPU": 0.5}
        assert sorted(growing.requested(), key=str) == [other, other, engine, engine]
        (first,) = growing.nodes()
        until_more(3)
        growing.drain(first)
        until_said("student engine 1 leaves its node, which is being drained; the pool has 1 student engine")
        until_said("student engine 2 has joined")
        (second,) = set(growing.nodes()) - {first}
        until_more(3)
        growing.kill(second)
        until_said("died; it is replaced")
        until_more(5)
        driver.terminate()
        assert driver.wait(timeout=60) == 130
        assert STOPPED in log.read_text()
        assert json.loads((run_dir / "run.json").read_text())["error"] == "stopped by a signal"
    finally:
        driver.kill()
        print(log.read_text()[-4000:])
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["trained"] for row in rows] == [16 * (i + 1) for i in range(len(rows))]
    assert {row["dropped"] for row in rows} == {0}
    assert max(row["staleness_max"] for row in rows) <= 2
    ledger = sqlite3.connect(run_dir / "ledger.sqlite")
    trained = ledger.execute("SELECT step, COUNT(*) FROM samples WHERE state = 'trained' GROUP BY step").fetchall()
    ledger.close()
    assert trained == [(row["step"], 16) for row in rows]
    assert growing.requested() == []
    wait_until(lambda: growing.nodes() == [], "the nodes that nobody needs were gone")
