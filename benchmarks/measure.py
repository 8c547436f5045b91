"""How things are measured here: cases in turn within one run, medians, peak memory in a process of its own."""

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
    """A command line with --device, cpu or cuda. doc: the benchmark's, of which --help has the first line."""
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


def seconds_in_turn(cases: Mapping[Case, Callable[[], object]], rounds: int) -> dict[Case, float]:
    """Median seconds of each case. A round runs every case once, so a slow minute of the machine meets all of them."""
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


def in_a_process(work: Callable[[], T]) -> T:
    """The result of work that sets up a process for itself."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work).result(timeout=600)


def peak_mib(case: Callable[..., Callable[[], object]], *args: Any) -> float:
    """Growth of the peak memory, MiB, while `case(*args)()` runs, in a fresh process: resident, or a GPU's.

    `case` makes what is there before and returns what is measured.
    """
    return in_a_process(partial(_peak, case, args))


def _peak(case: Callable[..., Callable[[], object]], args: Sequence[Any]) -> float:
    run = case(*args)
    if torch.cuda.is_initialized():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # What the preparation has freed goes back to the kernel: reused, it would hide what the case needs.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    resident = resident_kib("VmRSS")
    run()
    return (resident_kib("VmHWM") - resident) / 1024


def resident_kib(field: str, pid: int | str = "self") -> int:
    """A process's resident memory now (VmRSS) or at its peak (VmHWM)."""
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(f"{field}:")]
    return int(line.split()[1])


def report(name: str, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table and keep them, with the date and the number of threads, in results/NAME.json."""
    columns = list(rows[0])
    cells = [columns, *([f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    RESULTS.mkdir(exist_ok=True)
    kept = {"title": title, "date": date.today().isoformat(), "threads": torch.get_num_threads(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
