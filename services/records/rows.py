"""The JSON lines of a run: one for each step, result, kept reply and event, on disk before the run goes on."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from sdft.services.base.errors import UserError
from sdft.services.records.completions import CompletionFigures
from sdft.services.records.figures import COLOURS, GREY, Curve, Figure, Phase, figure
from sdft.services.records.text import percent

DIVERGENCE_NAMES = {
    "forward": "forward KL",
    "reverse": "reverse KL",
    "jsd": "JSD",
    "sampled": "sampled-token KL",
    "nll": "NLL",
    "dft": "NLL",
}
# Metric names in eval.jsonl. The teacher's prompt has the demonstration.
STUDENT_ACCURACY, TEACHER_ACCURACY = "accuracy", "teacher_accuracy"
PERPLEXITY, PASS_AT = "perplexity", "pass@"
Z_95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class StepMetrics(CompletionFigures):
    """One optimizer step. Times in seconds, divergences in nats a token; trained, dropped: samples since the start.

    With max_staleness above 0, time_rollout_s and time_score_s are how long the batch took to make, queueing included,
    beside earlier steps. time_wait_s is then how long the learner waited for the batch.
    """

    step: int
    stage: int = field(metadata=figure("Stage that the last step belongs to", "stage"))
    loss: float = field(metadata=figure("Loss of the last step", "loss"))
    divergence: float = field(metadata=figure("Divergence of the last step, nats per token", "divergence"))
    direction: str  # divergence: forward, reverse, jsd or sampled; for demonstrations nll or dft
    grad_norm: float = field(
        metadata=figure(
            "Norm of the last step's gradient, before it is clipped",
            "grad_norm",
            curve=Curve("Gradient norm", "gradient norm", "Before clipping.", COLOURS[2]),
        )
    )
    lr: float = field(
        metadata=figure(
            "Learning rate of the last step",
            "learning_rate",
            curve=Curve("Learning rate", "learning rate", "", GREY),
        )
    )
    samples: int = field(metadata=figure("Samples of all steps", "samples_total", counter=True))
    prompt_tokens: int = field(metadata=figure("Prompt tokens of all steps", "prompt_tokens_total", counter=True))
    completion_tokens: int = field(
        metadata=figure("Completion tokens of all steps", "completion_tokens_total", counter=True)
    )
    student_version: int = field(
        metadata=figure("Newest weight version that sampled for the last step", "student_version")
    )
    teacher_version: int = field(
        metadata=figure("Oldest weight version of the teacher that scored for the last step", "teacher_version")
    )
    staleness_mean: float = field(
        metadata=figure("Mean staleness of the last step's rollouts, in steps", "staleness_mean")
    )
    staleness_max: int = field(
        metadata=figure("Largest staleness of the last step's rollouts, in steps", "staleness_max")
    )
    mismatch_kl: float = field(
        metadata=figure(
            "Estimated KL between sampler and learner, nats per token",
            "mismatch_kl",
            curve=Curve(
                "Mismatch",
                "KL of sampler and learner",
                "Estimated KL divergence of the sampler, at its temperature and top_p, from the learner.",
                COLOURS[3],
            ),
        )
    )
    tail_mass: float = field(
        metadata=figure(
            "Mean probability mass of the teacher outside the support",
            "tail_mass",
            curve=Curve(
                "Tail mass",
                "teacher probability outside the support",
                "Teacher probability outside the support: the tail bucket.",
                COLOURS[4],
            ),
        )
    )
    time_rollout_s: float
    time_score_s: float
    time_learn_s: float
    time_sync_s: float
    time_wait_s: float
    time_step_s: float = field(metadata=figure("Time of the last step", "step_seconds"))
    tokens_per_s: float = field(metadata=figure("Completion tokens per second of the last step", "tokens_per_second"))
    trained: int = field(
        metadata=figure("Samples trained; falls when the run resumes from an earlier step", "samples_trained")
    )
    dropped: int = field(
        metadata=figure("Samples dropped; falls when the run resumes from an earlier step", "samples_dropped")
    )
    in_flight: int = field(
        metadata=figure("Samples in flight: issued, and neither trained nor dropped", "samples_in_flight")
    )
    # None: the file does not have it.
    loss_tokens: int | None = field(
        default=None,
        metadata=figure("Loss tokens of all steps", "loss_tokens_total", counter=True),
    )
    # None: the loss has no clip, or not the entropy.
    clipped: float | None = field(
        default=None,
        metadata=figure("Share of the last step's loss tokens whose divergence is clipped", "clipped"),
    )
    loss_entropy: float | None = field(
        default=None,
        metadata=figure("Mean entropy of the student at the last step's loss tokens, nats", "loss_entropy"),
    )

    def seconds(self, phase: Phase) -> float:
        """Return the time of a phase."""
        return float(getattr(self, f"time_{phase.name}_s"))

    @property
    def divergence_name(self) -> str:
        return " and ".join(DIVERGENCE_NAMES.get(name, name) for name in self.direction.split(" and "))


def step_figures() -> dict[str, Figure]:
    """Return the figures of a step by field, in order."""
    in_order = sorted(fields(StepMetrics), key=lambda f: bool(f.kw_only))  # those of completions are last
    return {f.name: f.metadata["figure"] for f in in_order if "figure" in f.metadata}


def divergence_names(steps: Iterable[StepMetrics]) -> str:
    """Return the divergence names of all steps, joined: stages may have different ones."""
    return ", ".join(dict.fromkeys(m.divergence_name for m in steps))


def without_loss_tokens(steps: Sequence[StepMetrics]) -> str | None:
    """Return a warning if any step had no token in the loss, else None. Steps without loss_tokens do not count."""
    empty = sum(m.loss_tokens == 0 for m in steps)
    if empty == 0:
        return None
    if empty < len(steps):
        return (
            f"{empty} of {len(steps)} steps had no token in the loss: no completion was longer than method.skip_first"
        )
    return (
        "nothing was learnt: no completion was longer than method.skip_first, so no token was in the loss; lower "
        "method.skip_first, or train on longer replies"
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
    metric: str  # STUDENT_ACCURACY, TEACHER_ACCURACY, PERPLEXITY, pass@k or teacher_pass@k
    value: float
    n: int

    @property
    def by_teacher(self) -> bool:
        """Whether the teacher replied, with the demonstration in its prompt."""
        return self.metric.startswith("teacher_")

    @property
    def k(self) -> int | None:
        """k of a pass@k metric; None for any other metric."""
        _, found, k = self.metric.partition(PASS_AT)
        return int(k) if found else None

    @property
    def label(self) -> str:
        """The set's name, with pass@k for such a metric, and "(teacher)" for a result of the teacher."""
        asked = self.task if self.k is None else f"{self.task} {PASS_AT}{self.k}"
        return f"{asked} (teacher)" if self.by_teacher else asked

    @property
    def text(self) -> str:
        """The value formatted for display."""
        return f"perplexity {self.value:.2f}" if self.metric == PERPLEXITY else percent(self.value)

    def loss_since(self, before: "EvalResult") -> float:
        """Return the loss since `before`: the drop in the share of questions; for a perplexity, its relative rise."""
        if self.metric == PERPLEXITY:
            return self.value / before.value - 1
        return before.value - self.value

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval of the share (Wilson 1927). Without questions: (0, 1)."""
        if self.n < 1 or math.isnan(self.value):
            return 0.0, 1.0
        z2 = Z_95**2 / self.n
        centre = (self.value + z2 / 2) / (1 + z2)
        half = Z_95 / (1 + z2) * math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n))
        return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Reply:
    """One reply to one evaluation question, for display."""

    step: int
    task: str
    id: str
    prompt: str
    answer: Any  # the right answer, as a JSON value
    text: str  # the model's reply, its reasoning included
    correct: bool
    tokens: int | None = None  # of the reply; None: the file does not have it
    truncated: bool | None = None  # it reached the longest length of its set
    turns: int | None = None  # replies of an episode; text has all of them, tokens counts them
    entropy: float | None = None  # mean negative log-prob of its tokens, in nats; None: not known


@dataclass(frozen=True)
class Event:
    """What the retention guard found after a step, or what became of a gated teacher."""

    step: int
    stage: int
    kind: Literal["fell", "drifted", "refreshed", "refused"]  # guarded sets, detectors; the teacher's refresh
    text: str  # a sentence for display, without a full stop


SHOWN = 6  # replies of each set and step that are kept for display


def first_of_each_set(replies: Iterable[Reply]) -> list[Reply]:
    """Return the first SHOWN replies of each set at each step."""
    seen: Counter[tuple[int, str]] = Counter()
    shown = []
    for reply in replies:
        seen[reply.step, reply.task] += 1
        if seen[reply.step, reply.task] <= SHOWN:
            shown.append(reply)
    return shown


Row = TypeVar("Row", StepMetrics, EvalResult, Reply, Event)


def json_line(row: StepMetrics | EvalResult | Reply | Event) -> bytes:
    # JSON has no NaN: a non-finite number is written as null, and read back as NaN.
    values = {"step": row.step} | asdict(row)
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


FILES: dict[type, str] = {
    StepMetrics: "metrics.jsonl",
    EvalResult: "eval.jsonl",
    Reply: "samples.jsonl",
    Event: "events.jsonl",
}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, [] if there is none.

    An unterminated last line (a run killed while writing) is skipped if it cannot be parsed. Any other bad line raises
    UserError.
    """
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
    """Return the rows of one class in a run directory. A non-finite number is read as NaN.

    Raises UserError if a line lacks a required field.
    """
    path = run_dir / FILES[cls]
    names = [f.name for f in fields(cls)]
    needed = [f.name for f in fields(cls) if f.default is MISSING]
    rows = []
    for row in read_jsonl(path):
        missing = [name for name in needed if name not in row]
        if missing:
            raise UserError(
                f"{path}: a line of step {row['step']} has no {missing[0]!r}; another version of sdft wrote it; read "
                f"the run with that version"
            )
        values: dict[str, Any] = {k: row[k] for k in names if k in row}
        values |= {k: math.nan for k in needed if row[k] is None and k != "answer"}
        rows.append(cls(**values))
    return rows
