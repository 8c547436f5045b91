"""Measurement helpers: alternating cases within one run, medians, peak memory in a separate process."""

import argparse
import ctypes
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

Case = TypeVar("Case")
T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"


def device_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with --device, cpu or cuda. doc: the benchmark's docstring; --help shows its first line."""
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--device", type=_usable, choices=("cpu", "cuda"), default="cpu")
    return parser


def _usable(device: str) -> str:
    """The type of --device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda needs a GPU, and torch sees none on this machine; use cpu")
    return device


def seconds_in_turn(cases: Mapping[Case, Callable[[], object]], rounds: int) -> dict[Case, float]:
    """Median seconds of each case. A round runs every case once, so a slow minute of the machine affects all cases."""
    times: dict[Case, list[float]] = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, run in cases.items():
            seconds = _timed(run)
            if i:  # the first round warms up
                times[name].append(seconds)
    return {name: statistics.median(each) for name, each in times.items()}


def matrix_rate(dtype: torch.dtype, device: str = "cpu", rounds: int = 5) -> float:
    """Floating-point operations per second of a large square matrix product, the best of `rounds`."""
    product, operations = large_product(dtype, device)
    return operations / min(_timed(product) for _ in range(rounds + 1))


def large_product(dtype: torch.dtype, device: str = "cpu") -> tuple[Callable[[], object], int]:
    """A product of square matrices, large for the device, and its floating-point operations."""
    size = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: a @ b, 2 * size**3


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_a_process(work: Callable[[], T], limit_s: float = 600) -> T:
    """Run `work` in a new process and return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result(timeout=limit_s)


def peak_mib(case: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Growth of the peak memory in MiB while `case(*args)()` runs in a new process: resident, or on the GPU if used.

    `case` does the preparation and returns the callable that is measured.
    """
    return in_a_process(partial(_peak, case, args))


def _peak(case: Callable[..., Callable[[], object]], args: Sequence[Any]) -> float:
    run = case(*args)
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Return memory that the preparation freed to the kernel. Its reuse would hide what the case needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current resident size
    resident = resident_kib("VmRSS")
    run()
    return (resident_kib("VmHWM") - resident) / 1024


def resident_kib(field: str, pid: int | str = "self") -> int:
    """Current (VmRSS) or peak (VmHWM) resident memory of a process, in KiB."""
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(f"{field}:")]
    return int(line.split()[1])


def report(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table and save them, with the date and the number of threads, in results/NAME.json."""
    columns = list(rows[0])
    cells = [columns, *([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    kept = {"title": title, "date": date.today().isoformat(), "threads": torch.get_num_threads(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
