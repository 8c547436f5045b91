"""`sdft submit`: send the working directory to a Ray cluster and run `sdft train` or `sdft serve` there as a job.

    working directory, without excluded files ─► job on the cluster: sdft train CONFIG --run-dir RUN

The run directory is a path on the cluster, on storage that outlives the job. A job that is submitted again with the
same run directory resumes.
"""

import asyncio
import os
import shlex
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sdft.services.base.errors import PreflightError, UserError, first_line
from sdft.services.cluster.token import has_token

EXCLUDES = (".git", ".venv", "venv", "runs", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
AGENT_WAIT_S = 90
END_WAIT_S = 60
LIMIT_BYTES = 100 << 20  # limit for the files sent; Ray itself refuses at 500 MiB, after packing them


def submit(config: Path, run_dir: str | None, overrides: list[str], address: str, word: str = "train") -> str:
    """Submit the job and return its id. `config` is a file below the current directory, which is sent.

    word: the command of the job, train or serve.

    UserError for a bad path, address or size; PreflightError if no cluster takes jobs at the address.
    """
    working_dir = Path.cwd()
    try:
        inside = config.resolve().relative_to(working_dir)
    except ValueError:
        raise UserError(
            f"{config}: the file is not below {working_dir}, the folder that is sent to the cluster; run `sdft submit` "
            f"in a folder that holds the configuration and its data"
        ) from None
    if run_dir is None or not Path(run_dir).is_absolute():
        raise UserError(
            f"--run-dir {run_dir or '(missing)'}: give an absolute path on storage that every node of the cluster "
            f"sees, because Ray deletes the job's copy of the working directory"
        )
    _check_address(address)
    client_class, refused = _client()
    _check_size(working_dir)
    command = ["sdft", word, str(inside), "--run-dir", run_dir]
    for override in overrides:
        command += ["--set", override]
    deadline = time.monotonic() + AGENT_WAIT_S
    while True:
        try:
            return str(
                client_class(address).submit_job(
                    entrypoint=shlex.join(command),
                    runtime_env={"working_dir": str(working_dir), "excludes": list(EXCLUDES)},
                )
            )
        except refused as error:
            # A cluster that has just started answers before it can run anything.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise PreflightError(
                    f"--address {address}: no Ray cluster takes jobs there ({first_line(error)}); give the address "
                    f"of its dashboard, such as http://HEAD:8265"
                ) from None
        time.sleep(2)


async def follow(job: str, address: str) -> bool:
    """Print the job's output until it ends; return whether it succeeded. TimeoutError END_WAIT_S after its output."""
    client_class, _ = _client()
    client = client_class(address)
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
    deadline = time.monotonic() + END_WAIT_S
    while not (status := client.get_job_status(job)).is_terminal():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {END_WAIT_S} s for job {job} to end after its output; its status is {status}")
        await asyncio.sleep(0.5)
    return bool(status == "SUCCEEDED")


def _check_address(address: str) -> None:
    """UserError unless the address can be that of a dashboard."""
    protocol, _, _ = address.rpartition("://")
    if protocol not in ("http", "https") or not urlsplit(address).hostname:
        problem = {
            "": "names no protocol",
            "ray": "is an address for Ray Client",
            "http": "names no host",
        }.get(protocol.removesuffix("s"), f"has the unknown protocol {protocol}")
        raise UserError(
            f"--address {address} {problem}; give the address of the cluster's dashboard, as http://HEAD:8265 or "
            f"http://[IPV6]:8265"
        )


def _client() -> tuple[Any, tuple[type[Exception], ...]]:
    """Return Ray's job client class, and the exceptions that it raises on refusal.

    A cluster started on a machine with a token requires it. `ray job` and this client send it only if RAY_AUTH_MODE is
    "token".
    """
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # read when ray is imported
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    return JobSubmissionClient, (AuthenticationError, ConnectionError, RuntimeError, ValueError)


def _check_size(folder: Path) -> None:
    """UserError if the files to send exceed LIMIT_BYTES: they mostly hold a model or data set by mistake."""
    from sdft.services.cluster.compat import each_sent  # imports ray: see _client

    sizes: dict[Path, int] = {}

    def measure(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    each_sent(folder, EXCLUDES, measure)
    total = sum(sizes.values())
    if total > LIMIT_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        names = ", ".join(f"{path} ({sizes[path] / 1e6:.0f} MB)" for path in largest)
        raise UserError(
            f"{folder}: {total / 1e6:.0f} MB would be sent to the cluster, but at most {LIMIT_BYTES / 1e6:.0f} MB can "
            f"be; move the largest files out of this folder, and name them by absolute paths that the cluster's nodes "
            f"have: {names}"
        )
