"""The Ray cluster of a run: a running one if an address is set, else its own, which ends with the driver."""

import asyncio
import itertools
import json
import os
import re
import secrets
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sdft.actors.config import LEARNER
from sdft.actors.shared.process import scratch_folder
from sdft.actors.shared.reason import reason
from sdft.actors.shared.waiting import within
from sdft.services.base.environment import check_temporary
from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.signals import stop_on_signals
from sdft.services.cluster import head
from sdft.services.cluster.compat import TEMPORARY, read_authentication
from sdft.services.cluster.queries import ANSWER_S, FAILURES, in_thread
from sdft.services.cluster.token import has_token
from sdft.services.config.sections import RayConfig
from sdft.services.planning.parts import Part
from sdft.services.planning.plan import Plan

CONNECT_TIMEOUT_S = 10
START_S = 180  # limit for the start of Ray's processes: some 4 s on an idle machine
STOP_S = head.STOP_S + 5
SCRATCH = "sdft-ray-"
ADDRESS = re.compile(r"(\[(?P<ipv6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^\s:/\[\]]+)):(?P<port>\d{1,5})")
OBJECT_STORE_BYTES = 512 << 20  # batches are a few MiB; weights do not go through the object store


@contextmanager
def cluster(config: RayConfig, plan: Plan, logs: Path | None) -> Iterator[None]:
    """Connect to the configured cluster, or start one on this machine; keep only its logs, in the folder `logs`.

    Inside the block, SIGTERM and SIGINT cancel the running task, so that every clean-up runs. PreflightError if no
    cluster answers or none can be started.
    """
    address = config.running
    if address:
        endpoint = host_and_port(address)
        try:
            if endpoint is not None:  # Ray itself would try for eight minutes
                socket.create_connection(endpoint, timeout=CONNECT_TIMEOUT_S).close()
            _connect(address)
        except OSError as error:
            raise PreflightError(
                f"no Ray cluster answers at {address} ({error}); start one, or unset ray.address and RAY_ADDRESS"
            ) from None
        with _connected():
            yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_temporary(SCRATCH)
    _ensure_token()
    with scratch_folder(SCRATCH) as scratch:
        try:
            with _head(scratch, plan) as started:
                _connect(started, runtime_env={"env_vars": {"SDFT_SCRATCH": str(scratch)}})
                with _connected():
                    yield
        finally:
            if logs:
                _keep_logs(scratch, logs)


def _ensure_token() -> None:
    """Turn on Ray's token authentication, as ray.init does for a cluster that it starts in its own process.

    Without a token, which Ray would write into the home folder, the run gets its own.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
        if not has_token():
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        read_authentication()


def _connect(address: str, **options: Any) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except SystemExit:  # raised by Ray's own handler of SIGTERM
        raise KeyboardInterrupt from None


@contextmanager
def _connected() -> Iterator[None]:
    try:
        stop_on_signals()
        yield
    finally:
        ray.shutdown()


@contextmanager
def _head(scratch: Path, plan: Plan) -> Iterator[str]:
    """Start Ray's processes here, outside the driver's process group; yield the cluster's address."""
    settings = {
        "num_cpus": max(os.cpu_count() or 1, -int(-plan.cpus // 1)),
        "object_store_memory": OBJECT_STORE_BYTES,
        "logging_level": "ERROR",
        TEMPORARY: str(scratch),
    }
    words = [sys.executable, "-P", head.__file__, json.dumps(settings)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, bufsize=0, start_new_session=True)
    assert process.stdin is not None
    try:
        answer = _answer(process)
        if "error" in answer:
            raise PreflightError(f"Ray could not be started here: {answer['error'].splitlines()[0]}")
        yield answer["address"]
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(process: "subprocess.Popen[bytes]") -> dict[str, str]:
    """Return the message of the started process. PreflightError if it ends or prints none within START_S."""
    output = process.stdout
    assert output is not None
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if select.select([output], [], [], 1)[0]:
            line = output.readline()
            if not line:
                raise PreflightError(
                    f"Ray could not be started here: its first process ended with exit code {process.wait()}"
                )
            if line.startswith(b"{"):
                answer: dict[str, str] = json.loads(line)
                return answer
    raise PreflightError(f"Ray could not be started here within {START_S} s; check whether this machine is overloaded")


def host_and_port(address: str) -> tuple[str, int] | None:
    """Return host and port of a cluster's address, HOST:PORT or [IPV6]:PORT; None for "auto", for which Ray searches
    this machine. UserError for any other address."""
    if address == "auto":
        return None
    protocol, _, rest = address.rpartition("://")
    match = ADDRESS.fullmatch(rest)
    if not protocol and match:
        return match["ipv6"] or match["host"], int(match["port"])
    problem = {
        "": "names no port" if ":" not in rest else "is not HOST:PORT",
        "ray": "is an address for Ray Client, which cannot drive a run",
        "http": "is the address of a dashboard, which is only for jobs (`sdft submit --address`)",
    }.get(protocol.removesuffix("s"), f"has the unknown protocol {protocol}")
    raise UserError(
        f"ray.address (or RAY_ADDRESS) {address} {problem}; give the cluster's address as HOST:6379 or [IPV6]:6379, "
        f"auto for a cluster on this machine, or none to start one"
    )


def _keep_logs(scratch: Path, logs: Path) -> None:
    """Copy the output of the engines and the learner to the run's logs, one folder per start.

    A failure does not fail the run; it only prints a line on stderr.
    """
    kept = logs / time.strftime("ray-%Y%m%d-%H%M%S")
    try:
        for path in scratch.glob("session_2*/logs/**/*"):
            name = Path(*path.relative_to(scratch).parts[2:])
            if path.is_file() and "old" not in name.parts:
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, kept / name)  # without the modes: Ray's folders are world-writable
    except OSError as error:
        print(f"Ray's logs could not be kept in {kept}: {error}", file=sys.stderr)


@asynccontextmanager
async def placement(config: RayConfig, plan: Plan) -> AsyncIterator[dict[str, list[dict[str, Any]]]]:
    """Reserve the plan's resources, packed onto few nodes. Yields Ray actor options by pool, and for LEARNER.

    PreflightError if the cluster is too small and ray.autoscaling is off, or if there is no room within ray.wait_s.
    """
    if not config.autoscaling:
        _check_capacity(plan)
    bundles = [part.bundle for part in plan.parts]
    labels = [dict(part.labels) for part in plan.parts]
    group = placement_group(bundles, strategy="PACK", bundle_label_selector=labels if any(labels) else None)
    try:
        try:
            await within(_reserved(group), config.wait_s, "room in the cluster")
        except TimeoutError:
            raise PreflightError(
                f"waited {config.wait_s:g} s (ray.wait_s) for {_parts(plan)}; free in the cluster now: {free()}; "
                f"{'the autoscaler added no node' if config.autoscaling else 'other jobs hold the rest'}"
            ) from None
        options: dict[str, list[dict[str, Any]]] = {}
        bundle = itertools.count()
        for name, parts in {**plan.pools, LEARNER: plan.learners}.items():
            options[name] = [_options(group, next(bundle), part) for part in parts]
        yield options
    finally:
        # The run's own cluster ends anyway. In a running one Ray also removes the group when the driver ends.
        if config.running:
            with suppress(*FAILURES):
                in_thread(lambda: remove_placement_group(group)).result(ANSWER_S)


@asynccontextmanager
async def places(config: RayConfig, plan: Plan) -> AsyncIterator[dict[str, list[dict[str, Any]]]]:
    """Enter `cluster` and `placement`, without keeping logs."""
    with cluster(config, plan, None):
        async with placement(config, plan) as options:
            yield options


async def _reserved(group: PlacementGroup) -> None:
    """Return once the group is placed. Ray's wait blocks asyncio: signals and limits take effect once a second."""
    while not group.wait(1):
        await asyncio.sleep(0)


def _check_capacity(plan: Plan) -> None:
    """PreflightError unless the live nodes, if free, could hold the plan; the check places the largest part first."""
    alive = [n for n in ray.nodes() if n["Alive"]]
    nodes, labels = [n["Resources"] for n in alive], [n["Labels"].items() for n in alive]
    room = [[n.get("CPU", 0.0), n.get("GPU", 0.0)] for n in nodes]
    for part in sorted(plan.parts, key=lambda part: (-part.gpus, -part.cpus)):
        fits = (r for r, has in zip(room, labels, strict=True) if has >= part.labels.items())
        place = next((r for r in fits if r[0] >= part.cpus and r[1] >= part.gpus), None)
        if place is None:
            offers = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes) or "none"
            raise PreflightError(
                f"the run needs {_parts(plan)}, and the cluster's nodes have {offers}: no node{labelled(part.labels)} "
                f"has room for {part.name}; lower the cpus, gpus, tensor_parallel or replicas of actors and "
                f"learner, start more nodes, or set ray.autoscaling: true if the cluster grows by itself"
            )
        place[0] -= part.cpus
        place[1] -= part.gpus


def needs(cpus: float, gpus: float) -> str:
    """Return the resources as text, such as "4 CPUs and 1 GPUs"."""
    return f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")


def labelled(labels: Mapping[str, str]) -> str:
    """Return the labels as text that follows "node"; empty without labels."""
    return f" labelled {', '.join(f'{key}={value}' for key, value in labels.items())}" if labels else ""


def _parts(plan: Plan) -> str:
    """The resources of the plan and of each part, as text. A part must fit on one node."""
    parts = ", ".join(f"{p.name} {needs(p.cpus, p.gpus)}" for p in plan.parts)
    return f"{needs(plan.cpus, plan.gpus)} ({parts})"


def free() -> str:
    """Return as text the resources that are not reserved, summed over all nodes."""
    try:
        resources = in_thread(ray.available_resources).result(ANSWER_S)
    except FAILURES as error:
        return f"unknown ({reason(error)})"
    return needs(resources.get("CPU", 0), resources.get("GPU", 0))


def _options(group: PlacementGroup, index: int, part: Part) -> dict[str, Any]:
    return {
        "num_cpus": part.cpus,
        "num_gpus": part.gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        "max_restarts": 0,
    }
