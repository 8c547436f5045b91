"""Seconds and bytes of a step on a cluster that is not here, from measured and published rates.

    python -m benchmarks.projected [benchmarks/clusters/h100.yaml]

Each phase takes what bounds it: products, memory, links or the processor of the driver. The rates stand in the file, so
a copy with your own numbers projects your cluster. Nothing is run, and no phase slows another one down.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from benchmarks.given import file_of
from benchmarks.measure import report
from sdft.actors.shared.digests import MOST_THREADS
from sdft.services.base.section import Section

STATE_BYTES = 22  # a parameter of the learner in bfloat16: weights 2, gradients 4, masters 4, moments 8, teacher 4
OPTIMIZER_BYTES = 54  # read and written for a parameter in each optimizer step
ENGINE_SHARE = 0.9  # of a GPU's memory that an engine takes
MICRO_BATCH = 8192  # tokens of a learner rank's forward
NODE = 8  # GPUs
CLUSTERS = Path(__file__).parent / "clusters"


class Rates(Section):
    """What the hardware and this project's code reach."""

    products_tflops: float = Field(gt=0)
    memory_tb_s: float = Field(gt=0)
    gpu_gb: float = Field(gt=0)
    node_gb_s: float = Field(gt=0)
    network_gb_s: float = Field(gt=0)
    learner_share: float = Field(gt=0, le=1)
    scoring_share: float = Field(gt=0, le=1)
    decoding_overhead_s: float = Field(ge=0)
    digest_gb_s: float = Field(gt=0)
    controller_s: float = Field(ge=0)


class Batch(Section):
    """Tokens of a sequence."""

    prompt: int = Field(ge=1)
    teacher_prompt: int = Field(ge=1)
    completion: int = Field(ge=1)


class Model(Section):
    """Sizes of a model."""

    parameters: float = Field(gt=0)
    active: float | None = None  # parameters that a token passes; None: all
    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    vocabulary: int = Field(ge=1)

    @property
    def used(self) -> float:
        return self.active or self.parameters

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, in bfloat16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


class Place(Section):
    """GPUs of a role."""

    gpus: int = Field(ge=1)
    tensor_parallel: int = Field(1, ge=1)

    @property
    def engines(self) -> int:
        return max(1, self.gpus // self.tensor_parallel)


class Case(Section):
    """A model, a batch and where the roles stand."""

    name: str
    model: Model
    sequences: int = Field(ge=1)
    learner: Place
    student: Place
    teacher: Place


class Cluster(Section):
    """The file."""

    rates: Rates
    batch: Batch
    cases: list[Case]


def phases(case: Case, batch: Batch, rates: Rates) -> dict[str, float]:
    """Return the seconds of each phase of a step."""
    model, products, memory = case.model, 1e12 * rates.products_tflops, 1e12 * rates.memory_tb_s
    link = 1e9 * (rates.node_gb_s if case.learner.gpus <= NODE else rates.network_gb_s)
    weights = 2 * model.parameters
    per_engine = case.sequences / case.student.engines
    at_once = min(per_engine, room(case, batch, rates))
    read = min(weights, 2 * model.used * at_once)  # a step of many sequences uses most experts
    cache = at_once * (batch.prompt + batch.completion / 2) * model.cache_bytes
    step = rates.decoding_overhead_s + (read + cache) / (memory * case.student.tensor_parallel)
    scored = case.sequences * (batch.teacher_prompt + batch.completion)
    trained = case.sequences * (batch.prompt + batch.completion)
    # ZeRO 3, by a ring that moves nearly all of it through each rank: in each micro-batch the weights twice, for
    # forward and backward, and the gradients once.
    micro_batches = math.ceil(trained / case.learner.gpus / MICRO_BATCH)
    digests = weights * (1 / MOST_THREADS + 1)
    gathered = 0 if case.learner.gpus == 1 else 3 * weights * micro_batches / link
    return {
        "rollout": batch.completion * step * per_engine / at_once,
        "score": 2 * model.used * scored / (products * rates.scoring_share * case.teacher.gpus),
        "learn": 6 * model.used * trained / (products * rates.learner_share * case.learner.gpus),
        "exchange": gathered,
        "optimizer": OPTIMIZER_BYTES * model.parameters / (memory * case.learner.gpus),
        # The student's and the teacher's: learner rank 0 broadcasts all of both (actors/transport/broadcast.py).
        # MOST_THREADS threads there make the digests, and one compares them before it sends.
        "weights": 2 * (weights / (1e9 * rates.network_gb_s) + digests / (1e9 * rates.digest_gb_s)),
        "controller": rates.controller_s * case.sequences,
    }


def room(case: Case, batch: Batch, rates: Rates) -> float:
    """Return how many whole sequences an engine's cache holds. Raises ValueError if it holds none."""
    free = ENGINE_SHARE * 1e9 * rates.gpu_gb * case.student.tensor_parallel - 2 * case.model.parameters
    held = free / ((batch.prompt + batch.completion) * case.model.cache_bytes)
    if held < 1:
        raise ValueError(f"{case.name}: an engine's memory holds no sequence; raise student.tensor_parallel")
    return held


def projected(case: Case, cluster: Cluster) -> dict[str, Any]:
    """Return a row of results."""
    seconds = phases(case, cluster.batch, cluster.rates)
    learner = sum(seconds[name] for name in ("learn", "exchange", "optimizer", "weights"))
    ahead = {"rollout": seconds["rollout"], "score": seconds["score"], "learner": learner}
    completion = case.sequences * cluster.batch.completion
    return {
        "case": case.name,
        **{f"{name} s": value for name, value in seconds.items()},
        "strict step s": sum(seconds.values()) - seconds["controller"],
        "one ahead s": max(*ahead.values(), seconds["controller"]),
        "bound by": max(ahead, key=lambda name: ahead[name]),
        "driver busy": seconds["controller"] / max(ahead.values()),
        "GB of weights": 2 * case.model.parameters / 1e9,
        "GB of tokens and scores": completion * (4 + 4 + 64 * 8) / 1e9,
        "GiB of state a learner GPU": STATE_BYTES * case.model.parameters / case.learner.gpus / 2**30,
    }


def read(path: Path) -> Cluster:
    """Read a file of rates and cases. Raises ValueError if a number is missing or unknown."""
    return Cluster.model_validate(yaml.safe_load(path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    default = str(CLUSTERS / "h100.yaml")  # argparse reads a default that is a string
    parser.add_argument("cluster", type=file_of(read), nargs="?", default=default, metavar="FILE")
    cluster = parser.parse_args().cluster
    rows = [projected(case, cluster) for case in cluster.cases]
    # One line for each figure: the cases are few and the figures many.
    table = [{"": name} | {row["case"]: row[name] for row in rows} for name in rows[0] if name != "case"]
    report("projected", "A step, projected", table)


if __name__ == "__main__":
    main()
