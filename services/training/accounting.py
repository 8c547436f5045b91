"""What becomes of a step's samples in the ledger: trained, or dropped because the gradient was not finite."""

from collections.abc import Callable, Sequence

from sdft.actors.shared.types import SampleId
from sdft.services.base.errors import RunFailed
from sdft.services.records.ledger import Ledger

MOST_NOT_FINITE = 8  # steps in a row without a finite gradient until the run fails


class Accounting:
    """Moves the samples of each step out of flight, and counts steps without a finite gradient."""

    def __init__(self, ledger: Ledger, note: Callable[[str], None]) -> None:
        self._ledger, self._note = ledger, note
        self._not_finite = 0  # steps in a row

    def step(self, step: int, ids: Sequence[SampleId], applied: bool) -> None:
        """Mark the samples of a step as trained, or as dropped if the gradient was not finite and changed no weight.

        Raises RunFailed after MOST_NOT_FINITE steps without a finite gradient in a row.
        """
        if applied:
            self._not_finite = 0
            self._ledger.advance(ids, "trained")
            return
        for sample in ids:
            self._ledger.drop(sample, "the step's gradient was not finite")
        self._not_finite += 1
        text = f"step {step}: the gradient is not finite; no weight changed, and its {len(ids)} samples are dropped"
        self._note(text)
        if self._not_finite == MOST_NOT_FINITE:
            raise RunFailed(
                f"{text}; this is step {MOST_NOT_FINITE} in a row without a finite gradient; export the last "
                f"checkpoint with `sdft export`, and start a new run from it with a lower learner.optimizer.lr or with "
                f"dtype: float32"
            )
