"""`sdft eval --harness`: run the benchmarks of EleutherAI's lm-eval on a model, in a separate process.

lm-eval uses its own backend: Hugging Face on a CPU, vLLM on a GPU. Its tasks say how they sample. Hugging Face would
add the penalties of the model's generation_config.json to greedy decoding, so they are set to values without effect.

    model folder, tasks ─► python -m lm_eval ─► its results file ─► a line for each task and metric
"""

import importlib.util
import math
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.base.errors import PreflightError, UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.generation import PENALTIES, sampling_defaults
from sdft.services.records.rows import Z_95

LAST_LINES = 40  # of lm-eval's output, searched for the reason of a failure


@dataclass(frozen=True)
class Score:
    """One metric of one task, in lm-eval's unit: mostly a share, a perplexity for some tasks."""

    task: str
    metric: str
    value: float
    stderr: float  # NaN if lm-eval reports none
    n: int

    def __str__(self) -> str:
        half = "" if math.isnan(self.stderr) else f" ± {Z_95 * self.stderr:.4f}"
        return f"{self.task:<24}{self.metric:<16}{self.value:.4f}{half}  n {self.n}"


def run_harness(config: RunConfig, model: Path, tasks: str, include: str | None, limit: int | None) -> bytes:
    """Return the content of lm-eval's results file for the comma-separated `tasks`.

    include: a folder with the user's own task files. limit: questions per task. UserError for an unknown task or a
    missing folder, PreflightError if lm-eval is not installed or data cannot be downloaded, TimeoutError after
    evaluation.grading_timeout_s.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PreflightError("--harness needs lm-eval, which is not installed here: pip install 'sdft[harness]'")
    if include is not None and not Path(include).is_dir():
        raise UserError(f"--harness-tasks {include}: no such folder; give the folder with your task files")
    with tempfile.TemporaryDirectory(prefix="sdft-harness-") as scratch:
        on_gpu = config.device == "cuda"
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "vllm" if on_gpu else "hf"]
        command += ["--model_args", f"pretrained={model},dtype={config.dtype}", "--device", config.device]
        command += ["--tasks", tasks, "--batch_size", "auto" if on_gpu else "8", "--output_path", scratch]
        neutral = [f"{name}={PENALTIES[name]}" for name in sampling_defaults(model) if name in PENALTIES]
        command += ["--gen_kwargs", ",".join(neutral)] if neutral and not on_gpu else []
        command += [] if include is None else ["--include_path", include]
        command += [] if limit is None else ["--limit", str(limit)]
        _run(command, tasks, config.evaluation.grading_timeout_s)
        (path,) = Path(scratch).rglob("results_*.json")
        return path.read_bytes()


def scores(results: dict[str, Any]) -> list[Score]:
    """Return the scores in lm-eval's results file: {"results": {task: {"acc,none": 0.5, "acc_stderr,none": 0.1}},
    "n-samples": ...}. A group of tasks has no n-samples; its "sample_len" is the sum over its tasks."""
    found = []
    for task, figures in results["results"].items():
        n = results.get("n-samples", {}).get(task, {}).get("effective", figures.get("sample_len", 0))
        for key, value in figures.items():
            metric, comma, variant = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = figures.get(f"{metric}_stderr,{variant}")
                error = float(stderr) if isinstance(stderr, int | float) else math.nan
                found.append(Score(task, metric, float(value), error, n))
    return found


def _run(command: Sequence[str], tasks: str, timeout_s: float) -> None:
    """Run a command and copy its output to stderr line by line. Raises TimeoutError, or the error of `_reason`."""
    last: deque[str] = deque(maxlen=LAST_LINES)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout_s, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line)
            print(line, end="", file=sys.stderr, flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        process.kill()
    if late.is_set():
        raise TimeoutError(f"waited {timeout_s:g} s (evaluation.grading_timeout_s) for lm-eval to run {tasks}")
    if code != 0:
        raise _reason(tasks, last)


def _reason(tasks: str, last: Sequence[str]) -> Exception:
    lines = [line.strip() for line in last if line.strip()]
    for line in reversed(lines):
        if "Tasks not found" in line:
            return UserError(
                f"--harness {tasks}: lm-eval has no such task ({line}); `lm-eval ls tasks` lists all tasks"
            )
        if "on the Hub" in line or "ConnectionError" in line or "LocalEntryNotFound" in line:
            return PreflightError(
                f"--harness {tasks}: lm-eval downloads a task's data at its first use, and the hub cannot be reached "
                f"({line}); connect to it once, or give your own task files with --harness-tasks DIR"
            )
    return RuntimeError(f"lm-eval could not run {tasks}: {lines[-1] if lines else 'it printed nothing'}")
