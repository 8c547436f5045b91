"""What `sdft serve` is given: a configuration, a run to serve on, or the folder of a service."""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.base.files import resolve_path
from sdft.services.config.load import load_config
from sdft.services.config.paths import with_absolute_paths
from sdft.services.config.run import RunConfig
from sdft.services.records.checkpoints import newest_usable
from sdft.services.serving.folder import ServiceFolder


def service_of(target: Path, overrides: Sequence[str], run_dir: Path | None) -> tuple[RunConfig, ServiceFolder]:
    """Return the configuration, with absolute paths, and the folder of a service. Raises UserError."""
    if target.is_dir() and (ServiceFolder(target).journal.exists()):
        if run_dir is not None and run_dir.resolve() != target.resolve():
            raise UserError(f"{target} is the folder of a service; remove --run-dir")
        if not ServiceFolder(target).config.exists():
            raise UserError(f"{target}: its config.yaml is missing; give the configuration that it began with")
        return _absolute(load_config(target / "config.yaml", overrides), target), ServiceFolder(target.resolve())
    if target.is_dir():
        return _of_run(target, overrides, run_dir)
    config = load_config(target, overrides)
    if config.service is None:
        raise UserError(f"{target}: it has no section service; add `service: {{}}`, which sets the defaults")
    folder = Path(run_dir or config.run_dir or Path("runs") / target.stem)
    return _absolute(config, target.parent), ServiceFolder(folder.resolve())


def _absolute(config: RunConfig, base: Path) -> RunConfig:
    made = with_absolute_paths(config, base)
    if made.service is None:
        raise UserError("service is missing; add `service: {}`, which sets the defaults")
    http = made.service.http
    files = {
        key: str(resolve_path(base, value).resolve())
        for key in ("tokens", "tls_certificate", "tls_key")
        if (value := getattr(http, key)) is not None
    }
    return made.model_copy(update={"service": made.service.model_copy(update={"http": http.model_copy(update=files)})})


def _of_run(run: Path, overrides: Sequence[str], run_dir: Path | None) -> tuple[RunConfig, ServiceFolder]:
    """Return a service that begins with the newest checkpoint of a run, and trains as its last stage did."""
    if not (run / "config.yaml").exists():
        raise UserError(f"{run}: neither a service nor a run is in this folder; give a configuration")
    folder = ServiceFolder((run_dir or run / "service").resolve())
    if folder.journal.exists() and folder.config.exists():
        return _absolute(load_config(folder.config, overrides), folder.path), folder
    checkpoint, _ = newest_usable(run)
    if checkpoint is None:
        raise UserError(f"{run} has no checkpoint to serve; see `sdft status {run}`")
    task = load_config(run / "config.yaml").tasks[-1]
    given = {name: value for name, value in task.model_dump(mode="json").items() if name in RunConfig.model_fields}
    given |= {"service": {}, "run_dir": None, "stages": []}
    given["data"]["train"], given["data"]["source"] = "inbox", "file"
    given["training"] |= {"epochs": None, "steps": None}
    start = folder.path / "start"
    shutil.rmtree(start, ignore_errors=True)
    folder.path.mkdir(parents=True, exist_ok=True)
    words = (sys.executable, "-m", "sdft.services.cli", "export", str(run), "--out", str(start))
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip().removeprefix("sdft: "))
    given["model"] = str(start)
    path = folder.path / "from-run.json"
    path.write_text(json.dumps(given))
    return _absolute(load_config(path, overrides), folder.path), folder
