"""Recorded batches: the learner's input at every step, one file a step, so that the learner can be replayed alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdft.actors.shared.sequences import Span, TrainingSequence
from sdft.actors.shared.types import ExpertArray, SampleId, TeacherScores
from sdft.services.base.files import write_atomically

FOLDER = "rollouts"


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}.npz"


def write_batch(run_dir: Path, step: int, sequences: Sequence[TrainingSequence]) -> None:
    """Write the batch of optimizer step `step` as numpy arrays, with the sequences concatenated."""
    spans = [(span.version, span.start, span.end) for s in sequences for span in s.spans]
    scores = [s.teacher for s in sequences if s.teacher is not None]
    arrays = {
        "sample": np.array([s.sample for s in sequences]),
        "lengths": np.array([len(s) for s in sequences]),
        "token_ids": np.concatenate([s.token_ids for s in sequences]),
        "loss_mask": np.concatenate([s.loss_mask for s in sequences]),
        "logprobs": np.concatenate([s.logprobs for s in sequences]),
        "span_counts": np.array([len(s.spans) for s in sequences]),
        "spans": np.array(spans).reshape(-1, 3),
        "seeds": np.array([s.seed for s in sequences]),
        "finish_reasons": np.array([s.finish_reason for s in sequences]),
        "objectives": np.array([s.objective for s in sequences]),
        "taught": np.array([s.teacher is not None for s in sequences]),
        "teacher_versions": np.array([t.version for t in scores]),
    }
    if scores:
        # Objectives may have different numbers of teacher tokens, so these two are flat.
        arrays |= {
            "teacher_k": np.array([t.ids.shape[1] for t in scores]),
            "teacher_ids": np.concatenate([t.ids.ravel() for t in scores]),
            "teacher_logprobs": np.concatenate([t.logprobs.ravel() for t in scores]),
            "teacher_sampled": np.concatenate([t.sampled for t in scores]),
        }
    routed = [s.experts for s in sequences if s.experts is not None]
    if routed:
        arrays |= {"routed": np.array([s.experts is not None for s in sequences]), "experts": np.concatenate(routed)}
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    path = path_of(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, file.getvalue())


def read_batch(run_dir: Path, step: int) -> list[TrainingSequence]:
    """Return the learner's batch of optimizer step `step`, bit for bit."""
    with np.load(path_of(run_dir, step)) as file:
        a = {name: file[name] for name in file.files}
    tokens, spans = _cuts(a["lengths"]), _cuts(a["span_counts"])
    teachers = _teachers(a, [int(a["loss_mask"][cut].sum()) for cut in tokens])
    experts = _experts(a)
    return [
        TrainingSequence(
            sample=SampleId(*map(int, a["sample"][i])),
            token_ids=a["token_ids"][cut],
            loss_mask=a["loss_mask"][cut],
            logprobs=a["logprobs"][cut],
            spans=tuple(Span(*map(int, span)) for span in a["spans"][spans[i]]),
            teacher=teachers[i],
            seed=int(a["seeds"][i]),
            finish_reason=str(a["finish_reasons"][i]),
            objective=int(a["objectives"][i]),
            experts=experts[i],
        )
        for i, cut in enumerate(tokens)
    ]


def _experts(a: dict[str, np.ndarray]) -> list[ExpertArray | None]:
    """Return the experts of each sequence, or None."""
    found: list[ExpertArray | None] = [None] * len(a["lengths"])
    if "routed" in a:
        routed = np.flatnonzero(a["routed"])
        for i, cut in zip(routed, _cuts(a["lengths"][routed]), strict=True):
            found[i] = a["experts"][cut]
    return found


def _teachers(a: dict[str, np.ndarray], loss_tokens: Sequence[int]) -> list[TeacherScores | None]:
    """Return the teacher's scores of each sequence, or None. loss_tokens: those of each sequence."""
    taught = np.flatnonzero(a["taught"])
    if not len(taught):
        return [None] * len(loss_tokens)
    rows, widths = np.array([loss_tokens[i] for i in taught]), a["teacher_k"]
    found: list[TeacherScores | None] = [None] * len(loss_tokens)
    for i, row, cell, k, version in zip(
        taught, _cuts(rows), _cuts(rows * widths), widths, a["teacher_versions"], strict=True
    ):
        found[i] = TeacherScores(
            a["teacher_ids"][cell].reshape(-1, k),
            a["teacher_logprobs"][cell].reshape(-1, k),
            a["teacher_sampled"][row],
            int(version),
        )
    return found


def recorded_steps(run_dir: Path) -> list[int]:
    """Return the steps whose batches were recorded, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run_dir / FOLDER).glob("step-*.npz"))


def _cuts(lengths: np.ndarray) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
