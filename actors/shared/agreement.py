"""Checks that engine and learner agree: log-probs of the probe sequence before and after weight updates.

    as loaded:  engine == learner                      both with the weights in the model's folder (version 0)
    version 0:  engine after the update == before it   the same weights: a difference is damage by the update
    any other:  engine == learner                      up to rounding

Rounding is estimated from the gap as loaded and from how far training has moved the log-probs since. An engine whose
first update is not version 0 (after a resume, or in place of a lost engine) has no such gap. Its bound is `limit`
alone. So it is for an engine that holds the weights of several owners in turn.
"""

from sdft.actors.shared.types import FloatArray, Snapshot, WeightMismatch, relative_gap

SAME = 1 / 64  # share of the limit: bound between two probes of one idle engine with the same weights
# Gap allowed after training: twice the gap as loaded, plus ROUNDING times the limit, plus OF_MOVED times the distance
# that the log-probs have moved. A tiny model in bfloat16 had 0.0008 as loaded and 0.0006 to 0.0013 in 30 steps.
ROUNDING, OF_MOVED = 1 / 8, 1 / 4


class Agreement:
    """The agreement of one engine with the learner. Gaps are those of `relative_gap`."""

    def __init__(self, limit: float, shared: bool = False) -> None:
        """limit: upper bound on every gap (weights.max_probe_gap). shared: as in EngineSettings."""
        self._limit, self._shared = limit, shared
        self._as_loaded: FloatArray | None = None  # the engine's log-probs before its first update
        self._base: Snapshot | None = None  # version 0, if that was the first update

    @property
    def untried(self) -> bool:
        """Whether the gap as loaded is still to be measured: the engine has had no update, and has one owner."""
        return self._as_loaded is None and not self._shared

    def before_first(self, snapshot: Snapshot, logprobs: FloatArray) -> None:
        """Record the engine's log-probs before its first update, `snapshot`.

        logprobs [N - 1]: computed with the weights that the engine loaded itself.
        Raises WeightMismatch if `snapshot` is version 0 and the learner's log-probs with the same weights differ.
        """
        self._as_loaded = logprobs
        if snapshot.version == 0:
            self._base = snapshot
            _agree(
                snapshot.gap(logprobs),
                self._limit,
                f"{snapshot.role} engine and learner with the weights in the model's folder: their log-probs of the "
                f"probe sequence",
                "vLLM and transformers compute this model differently, so it cannot be trained here; choose another "
                "model, or, if dtype: float32 shows that it is rounding, raise weights.max_probe_gap",
            )

    def after(self, snapshot: Snapshot, logprobs: FloatArray) -> float:
        """The gap to the learner. logprobs [N - 1]: the engine's log-probs after an update to `snapshot`.

        Raises WeightMismatch if the gap is too large, or if an update to the weights that the engine had already
        loaded changed its log-probs.
        """
        what = f"{snapshot.role} weights v{snapshot.version}: the engine's log-probs of the probe sequence"
        if snapshot.version == 0 and self._as_loaded is not None:
            _agree(
                relative_gap(logprobs, self._as_loaded),
                SAME * self._limit,
                f"{what} before and after an update to the same weights",
                "vLLM keeps copies of this model's weights that an update damages, so it cannot be trained here; "
                "choose another model",
            )
        gap = snapshot.gap(logprobs)
        _agree(
            gap,
            self._allowed(snapshot),
            f"{what} and the learner's",
            "the engine does not have the weights that it was sent; if version 0 agreed and training is stable, the "
            "gap may be rounding: then raise weights.max_probe_gap",
        )
        return gap

    def _allowed(self, snapshot: Snapshot) -> float:
        if self._base is None or self._as_loaded is None:
            return self._limit
        moved = relative_gap(snapshot.probe_logprobs, self._base.probe_logprobs)
        shown = 2 * self._base.gap(self._as_loaded) + ROUNDING * self._limit + OF_MOVED * moved
        return min(self._limit, shown)


def _agree(gap: float, allowed: float, what: str, meaning: str) -> None:
    if not gap <= allowed:  # "not <=" makes NaN fail too
        raise WeightMismatch(f"{what} differ by {gap:.2g} of their size on average (allowed: {allowed:.2g}): {meaning}")
