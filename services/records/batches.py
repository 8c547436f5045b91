"""Recorded batches: the learner's input at every step, one file a step, so that the learner can be replayed alone."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdft.actors.shared.types import Rollout, SampleId, ScoredRollout, TeacherScores
from sdft.services.base.files import write_atomically

FOLDER = "rollouts"


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:06d}.npz"


def write_batch(run_dir: Path, step: int, samples: Sequence[ScoredRollout]) -> None:
    """Write the batch of optimizer step `step` as numpy arrays, with the sequences concatenated."""
    rollouts, scores = [s.rollout for s in samples], [s.scores for s in samples]
    versions = [span for r in rollouts for span in r.versions]
    arrays = {
        "sample": np.array([(s.sample.stage, s.sample.epoch, s.sample.index, s.sample.generation) for s in samples]),
        "prompt_lengths": np.array([len(r.prompt_ids) for r in rollouts]),
        "prompt_ids": np.concatenate([r.prompt_ids for r in rollouts]),
        "completion_lengths": np.array([len(r.completion_ids) for r in rollouts]),
        "completion_ids": np.concatenate([r.completion_ids for r in rollouts]),
        "logprobs": np.concatenate([r.logprobs for r in rollouts]),
        "version_counts": np.array([len(r.versions) for r in rollouts]),
        "versions": np.array(versions).reshape(-1, 3),
        "finish_reasons": np.array([r.finish_reason for r in rollouts]),
        "teacher_ids": np.concatenate([s.ids for s in scores]),
        "teacher_logprobs": np.concatenate([s.logprobs for s in scores]),
        "teacher_sampled": np.concatenate([s.sampled for s in scores]),
        "teacher_versions": np.array([s.version for s in scores]),
    }
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    path = path_of(run_dir, step)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, file.getvalue())


def read_batch(run_dir: Path, step: int) -> list[ScoredRollout]:
    """Return the learner's batch of optimizer step `step`, bit for bit."""
    with np.load(path_of(run_dir, step)) as file:
        a = {name: file[name] for name in file.files}
    prompts, completions, spans = (_cuts(a[n]) for n in ("prompt_lengths", "completion_lengths", "version_counts"))
    samples = []
    for i, (prompt, completion, span) in enumerate(zip(prompts, completions, spans, strict=True)):
        rollout = Rollout(
            a["prompt_ids"][prompt],
            a["completion_ids"][completion],
            a["logprobs"][completion],
            tuple((int(version), int(start), int(end)) for version, start, end in a["versions"][span]),
            str(a["finish_reasons"][i]),
        )
        scores = TeacherScores(
            a["teacher_ids"][completion],
            a["teacher_logprobs"][completion],
            a["teacher_sampled"][completion],
            int(a["teacher_versions"][i]),
        )
        samples.append(ScoredRollout(SampleId(*map(int, a["sample"][i])), rollout, scores))
    return samples


def recorded_steps(run_dir: Path) -> list[int]:
    """Return the steps whose batches were recorded, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run_dir / FOLDER).glob("step-*.npz"))


def _cuts(lengths: np.ndarray) -> list[slice]:
    ends = np.cumsum(lengths)
    return [slice(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]
