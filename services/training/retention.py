"""Guarded sets: whose results have fallen during training. guard.py takes the action.

results of an evaluation ─► breaches: guarded sets that fell by more than max_drop since their first result

A set's first result is from step 0. The first result of a set that was added later is from the step at which the run
was resumed with it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sdft.services.config.run import RunConfig
from sdft.services.records.rows import PERPLEXITY, STUDENT_ACCURACY, EvalResult


@dataclass(frozen=True)
class Breach:
    """A guarded set that fell by more than is allowed."""

    before: EvalResult
    now: EvalResult
    allowed: float

    def __str__(self) -> str:
        moved, unit = ("rose", "%") if self.now.metric == PERPLEXITY else ("fell", "points")
        lost = f"{100 * self.now.loss_since(self.before):.1f} {unit}, {100 * self.allowed:g} are allowed"
        before, now = self.before.text, self.now.text.removeprefix("perplexity ")
        return f"{self.now.label} {moved} from {before} to {now} (n {self.now.n}) at step {self.now.step}: {lost}"


class RetentionGuard:
    """Judges the evaluations of a run in order. earlier: the results from before a resume, judged first."""

    def __init__(self, config: RunConfig, earlier: Iterable[EvalResult]) -> None:
        self._guarded = set(config.guarded)
        max_drop = None if config.retention is None else config.retention.max_drop
        self._allowed = 1.0 if max_drop is None else max_drop
        self._allowed_pass_at = None if config.retention is None else config.retention.max_drop_pass_at
        self._before: dict[str, EvalResult] = {}  # by label
        self.last: dict[str, Breach] = {}  # the last breach of each set and each k of its pass@k
        self.held: int | None = None  # last step at which all guarded sets evaluated by then held
        by_step: dict[int, list[EvalResult]] = {}
        for result in earlier:
            by_step.setdefault(result.step, []).append(result)
        for step in sorted(by_step):
            self.judge(by_step[step])

    def judge(self, results: Iterable[EvalResult]) -> list[Breach]:
        """Return the breaches among the results of one step. A set's first result is the reference for later ones."""
        guarded = [(r, a) for r in results if r.task in self._guarded and (a := self._allowed_of(r)) is not None]
        breaches = []
        for result, allowed in guarded:
            before = self._before.setdefault(result.label, result)
            if result.loss_since(before) > allowed + 1e-9:  # shares are quotients: 0.3 may be 0.30000000000000004
                breaches.append(Breach(before, result, allowed))
        self.last |= {breach.now.label: breach for breach in breaches}
        if guarded and not breaches and {r.label for r, _ in guarded} >= self._before.keys():
            self.held = guarded[0][0].step
        return breaches

    def _allowed_of(self, result: EvalResult) -> float | None:
        """Return the largest loss of a guarded set's result; None if it is not guarded."""
        if result.metric in (STUDENT_ACCURACY, PERPLEXITY):
            return self._allowed
        return None if result.k is None or result.by_teacher else self._allowed_pass_at
