"""The log of a run: metrics.jsonl, eval.jsonl, samples.jsonl and events.jsonl; numbers are copied to the sinks."""

import json
import os
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from sdft.services.base.files import write_atomically
from sdft.services.monitoring.sinks import Sinks
from sdft.services.records.figures import path_of
from sdft.services.records.rows import FILES, EvalResult, Event, Reply, StepMetrics, json_line, read_jsonl


class RunLog:
    """Appends to the files of a run directory, and sends metrics and results to the sinks."""

    def __init__(self, run_dir: Path, sinks: Sinks | None = None) -> None:
        """sinks: not closed with the log. After the loss of a learner a run opens its log again with the same sinks."""
        run_dir.mkdir(parents=True, exist_ok=True)
        written = [row["step"] for name in ("metrics.jsonl", "eval.jsonl") for row in read_jsonl(run_dir / name)]
        self._files = {cls: (run_dir / name).open("ab") for cls, name in FILES.items()}
        self._sinks = sinks
        if sinks is not None:
            sinks.go_on(max(written, default=-1) + 1)

    def step(self, metrics: StepMetrics) -> None:
        self._append(metrics)
        if self._sinks is not None:
            values = {name: value for name, value in asdict(metrics).items() if name not in ("step", "direction")}
            self._sinks.log(metrics.step, {path_of(name): v for name, v in values.items() if v is not None})

    def evaluation(self, *results: EvalResult) -> None:
        """Append the results of an evaluation in one write.

        A killed run has all of them or none. An evaluation with only some of its results would not be repeated.
        """
        self._append(*results)
        for result in results:
            if self._sinks is not None:
                self._sinks.log(result.step, {f"eval/{result.task}/{result.metric}": result.value})

    def reply(self, reply: Reply) -> None:
        self._append(reply)

    def event(self, event: Event) -> None:
        self._append(event)

    def close(self) -> None:
        with ExitStack() as stack:  # closes every file even if one raises
            for file in self._files.values():
                stack.callback(file.close)

    def _append(self, *rows: StepMetrics | EvalResult | Reply | Event) -> None:
        """Append rows of one class to its file, and flush it to disk."""
        file = self._files[type(rows[0])]
        file.write(b"".join(json_line(row) for row in rows))
        file.flush()
        os.fsync(file.fileno())

    @staticmethod
    def rewind(run_dir: Path, step: int | None) -> None:
        """Remove the rows after `step` (None or -1: all rows), the step of the checkpoint to resume from.

        Each file is replaced atomically. Replies without results are removed too: their evaluation was interrupted and
        is repeated.
        """
        last = -1 if step is None else step
        evaluated = {(row["step"], row.get("task")) for row in read_jsonl(run_dir / FILES[EvalResult])}
        for row_type, name in FILES.items():
            path = run_dir / name
            if path.exists():
                kept = [row for row in read_jsonl(path) if row["step"] <= last]
                if row_type is Reply:
                    kept = [row for row in kept if (row["step"], row.get("task")) in evaluated]
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
