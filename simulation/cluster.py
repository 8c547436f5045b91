"""A cluster of simulated engines and a simulated learner under the real controller, ledger, pools and policies.

Engines and learner only model durations in virtual time, by the rates of rates.py. The processor time is that of the
control plane and of the simulation. Each step has twice as many samples as the student engines can compute at once. The
learner takes as long for them as the engines ("balanced") or a third longer, so that the engines suffice.
"""

import asyncio
import heapq
import random
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from rich.console import Console

from sdft.actors.roles import EVALUATION, STUDENT, teacher_pool
from sdft.actors.shared.drafts import Completion, Draft, Scores
from sdft.actors.shared.process import collect_rarely
from sdft.actors.shared.types import (
    GenerateRequest,
    Rollout,
    Sampling,
    Snapshot,
    Support,
    TeacherScores,
    UpdateReport,
)
from sdft.actors.transport.memory import MemoryTransport
from sdft.learner.group import LearnerGroup
from sdft.learner.types import StepResult
from sdft.services.config.run import RunConfig
from sdft.services.data.pairs import PromptPair
from sdft.services.data.schedule import make_schedule
from sdft.services.data.sources.fixed import FixedSource
from sdft.services.fleet.engine import Patience
from sdft.services.fleet.pool import EnginePool, PoolSettings
from sdft.services.monitoring.console import Progress
from sdft.services.monitoring.log import RunLog
from sdft.services.planning.plan import Plan
from sdft.services.planning.prepared import Prepared, Stage
from sdft.services.planning.shape import ModelShape
from sdft.services.records.ledger import Ledger
from sdft.services.records.rows import read_jsonl
from sdft.services.training.controller import Controller
from simulation import virtual_time
from simulation.engine import SimulatedEngine
from simulation.rates import Rates

USUAL = Rates()
ROUNDS = 2  # samples per step, as a multiple of what the student engines can compute at once
WARM = 3  # steps left out of the reported means
ANSWER = np.zeros(USUAL.most_tokens, dtype=np.int32)
LOGPROBS = np.zeros(USUAL.most_tokens, dtype=np.float32)
HELD = object()  # in place of Ray's reference to a rollout or to scores


@dataclass(frozen=True)
class Case:
    """One simulated case."""

    name: str
    engines: int  # student engines; the number of teacher engines follows from the load
    staleness: int = 2
    steps: int = 12
    learner: float = 1.33  # learner's time for a batch over the student engines' time; 1: balanced
    slow: float = 0.0  # share of engines that take four times as long
    links: float = 0.0  # share of engines that take 20 times as long to load weights
    lifetime_s: float | None = None  # mean lifetime of a student engine
    begin_with: float = 1.0  # share of the engines at the start; the pool may grow to all of them
    rates: Rates = USUAL


def tokens(seed: int | None, rates: Rates = USUAL) -> int:
    """Length of the rollout with this seed. Log-normal: mean mean_tokens, sigma 0.5, clipped to [1, most_tokens]."""
    length = random.Random(seed).lognormvariate(np.log(rates.mean_tokens) - 0.125, 0.5)
    return min(rates.most_tokens, max(1, round(length)))


class Student(SimulatedEngine):
    """Student engine whose duration follows from the lengths of the rollouts."""

    def __init__(self, number: int, case: Case) -> None:
        super().__init__(number)
        chance = random.Random(f"{case.name}/{number}")
        self._rates = case.rates
        self._token_s = case.rates.token_s * (4 if chance.random() < case.slow else 1)
        self._load_s = case.rates.load_s * (20 if chance.random() < case.links else 1)

    def start(self) -> tuple[float, Any]:
        return self._rates.start_s, None

    def sampled(self, items: list[GenerateRequest]) -> tuple[float, list[int]]:
        """Return the seconds to sample rollouts, and their lengths."""
        lengths = [tokens(request.seed, self._rates) for request in items]
        free = [0] * min(self._rates.room, len(lengths))  # when each slot of the engine's batch is free, in tokens
        for length in lengths:
            heapq.heappush(free, heapq.heappop(free) + length)
        return max(free) * self._token_s, lengths

    def generate(self, items: list[GenerateRequest], argument: Sampling) -> tuple[float, list[Rollout]]:
        seconds, lengths = self.sampled(items)
        made = [
            Rollout(r.prompt_ids, ANSWER[:n], LOGPROBS[:n], ((self.version, 0, n),), "stop")
            for r, n in zip(items, lengths, strict=True)
        ]
        return seconds, made

    def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
        return self._load_s, super().update_weights(snapshot)[1]


@lru_cache  # the time to make them belongs to the teacher engines, not to the control plane
def scores(tokens: int, version: int = 0) -> TeacherScores:
    """Return scores of a completion of this length, all of them zero."""
    return TeacherScores(ANSWER[:tokens, None], LOGPROBS[:tokens, None], LOGPROBS[:tokens], version)


class Teacher(SimulatedEngine):
    """Teacher engine that divides its time among its open calls."""

    rates = USUAL

    def start(self) -> tuple[float, Any]:
        return self.rates.start_s, None

    def score(self, pairs: list[Any], k: int) -> tuple[float, list[TeacherScores]]:
        return self.seconds_for(pairs), [scores(len(completion)) for _, completion in pairs]

    def seconds_for(self, items: list[Any]) -> float:
        """Return the seconds to score items beside the other open calls."""
        return self.rates.score_s * max(len(items), len(self._open) + 1)

    def update_weights(self, snapshot: Snapshot) -> tuple[float, UpdateReport]:
        return self.rates.load_s, super().update_weights(snapshot)[1]


class HoldingStudent(Student):
    """Student engine whose rollouts stay with it, as those of a Ray actor: it returns a reference to each."""

    def complete(self, items: list[GenerateRequest], argument: Sampling) -> tuple[float, list[Completion]]:
        seconds, lengths = self.sampled(items)
        return seconds, [Completion(HELD, n, ((self.version, 0, n),), "stop") for n in lengths]


class HoldingTeacher(Teacher):
    """Teacher engine whose scores stay with it."""

    def score_completions(self, items: list[Any], support: Support) -> tuple[float, list[Scores]]:
        return self.seconds_for(items), [Scores(HELD, 0) for _ in items]


class Learner:
    """Learner whose duration is proportional to the batch size. Records the staleness of each sample in `ages`."""

    def __init__(self, sample_s: float, rates: Rates = USUAL) -> None:
        self._sample_s, self._step, self._rates = sample_s, 0, rates
        self.ages: list[int] = []
        self.worked: list[float] = []  # seconds in each step

    async def train_step(self, sequences: list[Draft]) -> StepResult:
        self.ages += [self._step - s.oldest_version for s in sequences]
        self._step += 1
        self.worked.append(self._sample_s * len(sequences))
        await asyncio.sleep(self._sample_s * len(sequences))
        return StepResult(1.0, 1.0, 0.0, 0.0, 1.0, 1e-5, sum(s.sampled_tokens for s in sequences))

    async def publish(self, role: str, version: int) -> Snapshot:
        if self.worked:
            self.worked[-1] += self._rates.publish_s
        await asyncio.sleep(self._rates.publish_s)
        return Snapshot(role, version, "", "here", 0, (), ANSWER[:0], LOGPROBS[:0])

    async def save(self, folder: Path) -> None: ...

    async def written(self) -> None: ...


def pool(case: Case, name: str, most: int, make: Any) -> EnginePool:
    least = max(1, round(most * case.begin_with))
    settings = PoolSettings(
        name, least, most, case.staleness == 0, case.rates.room, Patience(600, 120, 10**6), 36000, 60, one_by_one=False
    )

    def nowhere_else() -> LearnerGroup:
        raise RuntimeError("all simulated engines are on one node")

    transport = MemoryTransport(name, nowhere_else, lambda text: None)
    return EnginePool(settings, make, transport, lambda text: None, lambda: "")


NOWHERE: Any = None  # contexts of a record, which the built-in algorithms do not use


def prepared(case: Case, batch: int) -> Prepared:
    config = RunConfig.model_validate(
        {
            "model": "simulated",
            "data": {"train": "simulated.jsonl"},
            "training": {"batch_size": batch, "steps": case.steps, "max_staleness": case.staleness},
            "monitoring": {"tensorboard": False},
            "checkpoint": {"every": 10**6},
        }
    )
    prompts = [PromptPair.of([1] * case.rates.prompt_tokens, [1] * case.rates.teacher_prompt_tokens)] * 1000
    (task,) = config.tasks
    source = FixedSource("simulated.jsonl", [], prompts)
    (schedule,) = make_schedule([task], [source]).stages
    return Prepared(
        config=config,
        path=Path("simulated.yaml"),
        model=Path("simulated"),
        shape=ModelShape(0, 0, 0, 0, 0, 0),
        tokenizer=None,
        stop_ids=(0,),
        vocabulary=1,
        stages=(Stage("", task, source, lambda index: NOWHERE, [], schedule, fingerprint=""),),
        common=[],
        plan=Plan({}, ()),
        begun=datetime.now(),
    )


async def deaths(case: Case, engines: EnginePool) -> None:
    """Kill random student engines until cancelled. Returns at once if `case.lifetime_s` is None."""
    chance = random.Random(case.name)
    while case.lifetime_s is not None:
        await asyncio.sleep(chance.expovariate(len(engines.engines) / case.lifetime_s))
        victim = chance.choice([e for e in engines.engines if e.up] or list(engines.engines))
        victim._actor.die()  # type: ignore[attr-defined]


def drive(
    ready: Prepared,
    run_dir: Path,
    case: Case,
    student: Callable[[int], SimulatedEngine],
    learner: "Learner",
    out: IO[str],
    teachers: int = 1,
    first_step: int = 0,
    evaluation: Callable[[int], SimulatedEngine] | None = None,
    teacher: Callable[[int], SimulatedEngine] = Teacher,
) -> float:
    """Run the real controller on simulated parts in virtual time. Returns the processor seconds of the training loop.

    out: stream for the progress display. student: creates the student engine with the given number.
    teachers: number of engines of each teacher; 0: the student engines score.
    first_step: the last completed step, from which the run resumes with the files that `run_dir` holds.
    evaluation: creates the engine of an evaluation pool; None: the student engines evaluate.
    teacher: creates a teacher engine.
    """
    ledger, log = Ledger(run_dir / "ledger.sqlite"), RunLog(run_dir)

    async def work() -> float:
        students = pool(case, STUDENT, case.engines, student)
        pools = {STUDENT: students}
        for name in map(teacher_pool, ready.config.teacher_in_use.routes) if teachers else ():
            pools[name] = pool(case, name, teachers, teacher)
        if evaluation is not None:
            pools[EVALUATION] = pool(case, EVALUATION, 1, evaluation)
        await asyncio.gather(*(engines.start() for engines in pools.values()))
        with Progress(Console(file=out, width=400), case.steps, case.name) as progress:
            controller = Controller(ready, run_dir, pools, cast(LearnerGroup, learner), ledger, log, progress)
            dying = asyncio.create_task(deaths(case, students))
            began = time.process_time()
            await controller.run(first_step)
            used = time.process_time() - began
            dying.cancel()
        await asyncio.gather(*(engines.stop() for engines in pools.values()))
        return used

    try:
        return virtual_time.run(work())
    finally:
        ledger.close()
        log.close()


def simulate(case: Case) -> dict[str, Any]:
    """Simulate one case and return a row of results. Must run in its own process, for its memory figures."""
    rates = case.rates
    batch = ROUNDS * case.engines * rates.room
    mean = float(np.mean([tokens(seed, rates) for seed in range(2000)]))
    made_s = mean * rates.token_s  # seconds of a rollout in one slot
    learner = Learner(case.learner * made_s / (case.engines * rates.room), rates)
    # A third more teacher engines than the load needs.
    teachers_needed = max(1, round(1.33 * rates.score_s * batch / (case.learner * ROUNDS * made_s)))
    with tempfile.TemporaryDirectory() as scratch, Path("/dev/null").open("w") as nowhere:
        run_dir, ready = Path(scratch), prepared(case, batch)
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        collect_rarely()

        def student(number: int) -> HoldingStudent:
            return HoldingStudent(number, case)

        def teacher(number: int) -> HoldingTeacher:
            made = HoldingTeacher(number)
            made.rates = rates
            return made

        used = drive(ready, run_dir, case, student, learner, nowhere, teachers_needed, teacher=teacher)
        rows = read_jsonl(run_dir / "metrics.jsonl")
    samples = batch * case.steps
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    later = rows[WARM:]
    step_s = float(np.mean([row["time_step_s"] for row in later]))
    ages = np.bincount(learner.ages, minlength=case.staleness + 1) / len(learner.ages)
    return {
        "case": case.name,
        "engines": case.engines,
        "teachers": teachers_needed,
        "samples": samples,
        "samples/s per core": samples / used,
        "us per sample": 1e6 * used / samples,
        "KiB per engine": grown_kib / case.engines,
        "step s": step_s,
        "learner busy": float(np.mean(learner.worked[WARM:])) / step_s,
        "ages": " ".join(f"{share:.2f}" for share in ages),
    }
