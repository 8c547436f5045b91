"""What a run writes down: a JSON line for each step, result and sample answer, on disk before the run goes on."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from sdft.services.base.errors import UserError
from sdft.services.records.text import percent

DIVERGENCE_NAMES = {
    "forward": "forward KL",
    "reverse": "reverse KL",
    "jsd": "JSD",
    "sampled": "sampled-token KL",
    "nll": "NLL",
    "dft": "NLL",
}
STUDENT, TEACHER = "accuracy", "teacher_accuracy"  # metrics of eval.jsonl; the teacher is shown the demonstration
PERPLEXITY, PASS_AT = "perplexity", "pass@"
Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. Times in seconds, divergences in nats a token; trained, dropped: samples since the start.

    With max_staleness above 0 the times of rollout and score are how long the batch took to be made, its turn awaited,
    beside earlier steps; then time_wait_s is how long the learner waited for it.
    """

    step: int
    stage: int
    loss: float
    divergence: float
    direction: str  # which divergence: forward, reverse, jsd or sampled; nll or dft of demonstrations
    grad_norm: float
    lr: float
    samples: int
    prompt_tokens: int
    completion_tokens: int
    student_version: int
    teacher_version: int
    staleness_mean: float
    staleness_max: int
    mismatch_kl: float
    tail_mass: float
    time_rollout_s: float
    time_score_s: float
    time_learn_s: float
    time_sync_s: float
    time_wait_s: float
    time_step_s: float
    tokens_per_s: float
    trained: int
    dropped: int
    in_flight: int
    loss_tokens: int | None = None  # of the completions' tokens those that were learnt from; None: not written yet then

    @property
    def divergence_name(self) -> str:
        return DIVERGENCE_NAMES.get(self.direction, self.direction)


def divergence_names(steps: Iterable[StepMetrics]) -> str:
    """Of all steps: stages may have different ones."""
    return ", ".join(dict.fromkeys(m.divergence_name for m in steps))


def without_loss_tokens(steps: Sequence[StepMetrics]) -> str | None:
    """A sentence if steps had no token to learn from; None if all had some, as far as they say."""
    empty = sum(m.loss_tokens == 0 for m in steps)
    if empty == 0:
        return None
    if empty < len(steps):
        return f"{empty} of {len(steps)} steps had no token in the loss: no completion was longer than loss.skip_first"
    return (
        "nothing was learnt: no completion was longer than loss.skip_first, so no token was in the loss; lower "
        "loss.skip_first, or train on longer replies"
    )


DETERMINISTIC_FIELDS = tuple(
    f.name for f in fields(StepMetrics) if not f.name.startswith("time_") and f.name != "tokens_per_s"
)


@dataclass(frozen=True)
class EvalResult:
    """One evaluation set at one step: `value` is a share (0 to 1) of `n` questions, or the perplexity of `n` tokens."""

    step: int
    stage: int
    task: str  # the evaluation set's name
    metric: str  # STUDENT, TEACHER, PERPLEXITY, pass@k or teacher_pass@k
    value: float
    n: int

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher answered, who is shown the demonstration."""
        return self.metric.startswith("teacher_")

    @property
    def k(self) -> int | None:
        """Of a pass@k how many answers a question may have."""
        _, found, k = self.metric.partition(PASS_AT)
        return int(k) if found else None

    @property
    def label(self) -> str:
        """The set's name, pass@k where that was asked, and whether it is the teacher that answered."""
        asked = self.task if self.k is None else f"{self.task} {PASS_AT}{self.k}"
        return f"{asked} (teacher)" if self.by_teacher else asked

    @property
    def text(self) -> str:
        """The value as people read it."""
        return f"perplexity {self.value:.2f}" if self.metric == PERPLEXITY else percent(self.value)

    def loss_since(self, before: "EvalResult") -> float:
        """What was lost since then: questions as a share of all of them; of a perplexity its relative rise."""
        if self.metric == PERPLEXITY:
            return self.value / before.value - 1
        return before.value - self.value

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share (Wilson 1927). Nothing asked: all of 0 to 1."""
        if self.n < 1 or math.isnan(self.value):
            return 0.0, 1.0
        z2 = Z_95**2 / self.n
        centre = (self.value + z2 / 2) / (1 + z2)
        half = Z_95 / (1 + z2) * math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Sample:
    """One answer to one evaluation question, to be read by people."""

    step: int
    task: str
    id: str
    prompt: str
    answer: Any  # the gold answer, as JSON holds it
    text: str  # what the model wrote, its reasoning included
    correct: bool


SHOWN = 6  # answers of each set that are kept to be read


def first_of_each_set(samples: Iterable[Sample]) -> list[Sample]:
    """The first SHOWN answers of each set."""
    seen: Counter[str] = Counter()
    shown = []
    for sample in samples:
        seen[sample.task] += 1
        if seen[sample.task] <= SHOWN:
            shown.append(sample)
    return shown


Row = TypeVar("Row", StepMetrics, EvalResult, Sample)


def json_line(row: StepMetrics | EvalResult | Sample) -> bytes:
    # JSON has no NaN: a number that is not finite is null in the file, and NaN again when read.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(row).items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


FILES: dict[type, str] = {StepMetrics: "metrics.jsonl", EvalResult: "eval.jsonl", Sample: "samples.jsonl"}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, [] if there is none. A last line without its end (a run killed while writing) is left
    out when it cannot be read; any other bad line is a UserError."""
    if not path.exists():
        return []
    rows = []
    *lines, unfinished = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, unfinished], 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            if number > len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error}); restore or remove the line") from error
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if number > len(lines):
                break
            raise UserError(f'{path}, line {number}: not an object with a "step"; restore or remove the line')
        rows.append(row)
    return rows


def read_rows(run_dir: Path, cls: type[Row]) -> list[Row]:
    """The lines of one kind in a run directory. A number that was not finite comes back as NaN."""
    path = run_dir / FILES[cls]
    names = [f.name for f in fields(cls)]
    needed = [f.name for f in fields(cls) if f.default is MISSING]
    rows = []
    for row in read_jsonl(path):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(f"{path}: a line of step {row['step']} has no {missing[0]!r}; another version wrote it")
        values: dict[str, Any] = {k: row[k] for k in names if k in row}
        values |= {k: math.nan for k in needed if row[k] is None and k != "answer"}
        rows.append(cls(**values))
    return rows
