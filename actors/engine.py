"""The interface of an engine. It names neither vLLM nor Ray: `actors.<pool>.engine` names an implementation.

    engine = Implementation(settings)                   # in a process of its own
    await engine.start()                                # loads the model folder `settings.model`
    rollouts = await engine.generate(requests, sampling)
    scores = await engine.score([(prompt_ids, completion_ids)], k)
    scores = await engine.score_at([(prompt_ids, completion_ids, ids)], k)
    report = await engine.update_weights(snapshot)      # at any time, also while requests are in flight
    engine.stop()

EngineWorker (worker.py) is the only caller. It runs the coroutines of one engine in one event loop, several at a time.
An error that a method raises ends the run, unless its description below says otherwise.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from sdft.actors.config import EngineSettings
from sdft.actors.shared.own_code import NotImportable, own_class
from sdft.actors.shared.types import (
    FloatArray,
    GenerateRequest,
    IntArray,
    NotReceived,
    Rollout,
    Sampling,
    Snapshot,
    TeacherScores,
    UpdateReport,
)


class Engine(ABC):
    """One engine: it samples, scores, and loads the weights that the learner publishes."""

    def __init__(self, settings: EngineSettings) -> None:
        """Return at once. `start` loads the model."""
        self.settings = settings

    @abstractmethod
    async def start(self) -> None:
        """Load the model. Raises RuntimeError with the cause if it cannot be loaded."""

    @abstractmethod
    async def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Rollout]:
        """Complete each prompt; return one rollout per request, in the order of the requests.

        A completion ends with one of settings.stop_ids, which it contains, or at sampling.max_new_tokens. Only the
        settings in `sampling` shape the distribution: defaults in the model folder (generation_config.json) do not.
        A rollout has the sampling.likely most likely tokens at each position (Rollout.likely). With
        settings.hold_batches equal calls return equal bits.
        """

    @abstractmethod
    async def score(
        self, pairs: Sequence[tuple[IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        """Score each completion after its prompt, in the order of the pairs.

        pairs: (prompt ids [P], completion ids [T]). The scores are the k largest log-probs at each completion token,
        and the log-prob of the token itself. temperature: the logits are divided by it (teacher.temperature).
        """

    async def score_at(
        self, items: Sequence[tuple[IntArray, IntArray, IntArray]], k: int, temperature: float = 1.0
    ) -> list[TeacherScores]:
        """Score given tokens at each completion token, in the order of the items; needed for supports but `teacher`.

        items: (prompt ids [P], completion ids [T], ids [T, S], or [1, S] for the same tokens everywhere). The scores
        are the log-probs of these S tokens, then the k largest log-probs of other tokens, and the log-prob of the
        token itself. An engine without it inherits this method.
        """
        raise NotImplementedError(f"{type(self).__name__} scores no given tokens; implement score_at")

    @abstractmethod
    async def probe(self, ids: IntArray) -> FloatArray:
        """Return the log-prob of every token of `ids` [N] after the first: [N - 1]."""

    @abstractmethod
    async def update_weights(self, snapshot: Snapshot) -> UpdateReport:
        """Load the snapshot's tensors, verify them, and serve them from now on.

        The receiver of the transport settings.transport returns a file with the bytes
        (`transport_class(name).receiver().receive(snapshot)`): only the transport knows what `snapshot.path` means.

        Rollouts in flight continue with the new weights; Rollout.versions says which tokens each version sampled.
        Raises, without a change of the weights, FileNotFoundError if the path is gone, and SnapshotDamaged if bytes are
        not as the digest says. Raises WeightMismatch if the log-probs of snapshot.probe_ids are not the learner's: the
        engine is replaced.
        """

    async def connect(self, place: Mapping[str, Any], own_address: str) -> None:
        """Prepare for streams of weights: snapshots without a `path`. place: the transport's own.

        own_address: the address of this machine. Raises NotReceived if the engine cannot connect: it then gets the
        snapshot with a path. An engine without streams inherits this method.
        """
        raise NotReceived(f"{type(self).__name__} receives no streams of weights")

    async def sleep(self) -> None:
        """Free the GPU's memory. Until `wake` only `ping` is called. Called only with settings.sleeps."""
        raise NotImplementedError(f"{type(self).__name__} cannot sleep")

    async def wake(self) -> None:
        """Be as before `sleep`, with the same weights. Called on an engine that is awake, too, after a replacement."""
        raise NotImplementedError(f"{type(self).__name__} cannot sleep")

    @abstractmethod
    async def ping(self) -> None:
        """Return when the engine has answered: the health check. An engine that does not return is replaced."""

    @property
    def dead(self) -> bool:
        """Whether a process that the engine has started has ended. The engine's own process then ends too."""
        return False

    @abstractmethod
    def stop(self) -> None:
        """Free what outlives this process. Runs in a thread, after the last request."""


def own_engine(name: str) -> type[Engine]:
    """Return the user's own implementation `package.module:Name`. Raises NotImportable, also if a method is missing."""
    found = own_class(name, Engine)  # type: ignore[type-abstract]
    missing = sorted(found.__abstractmethods__)
    if missing:
        raise NotImportable(f"{name} lacks {', '.join(missing)} of sdft.actors.engine.Engine; add them")
    return found
