"""Tokens and attention pairs that the learner's forward computes, against those that the samples need.

    python -m benchmarks.packing [PROMPTS.jsonl]

The batches come from the tool example (its own prompts, 5 to 32 new tokens) and, if given, from a file of rows whose
`prompt` is text or chat messages (5 to 128 new tokens). Sequences are not padded, except that attention pads short ones
within groups.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import report
from sdft.actors.shared.drafts import sequence_of
from sdft.actors.shared.sequences import TrainingSequence
from sdft.actors.shared.types import Rollout, SampleId, TeacherScores
from sdft.learner.model.attention import short
from sdft.learner.model.cpu.short_attention import length_groups
from sdft.learner.packing import pack
from sdft.learner.shares import micro_batches
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.models import resolve_model

TOOLS = Path(__file__).parent.parent / "examples" / "tools" / "train.jsonl"
BATCH, BUDGET = 8, 4096


def prompt_lengths(path: Path) -> list[int]:
    tokenizer = load_tokenizer(resolve_model("smollm2-135m", Path.cwd()))
    lengths = []
    for line in path.read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        lengths.append(len(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)))
    return lengths


def row(path: Path, most: int) -> dict[str, object]:
    rng = np.random.default_rng(0)
    lengths = rng.permutation(prompt_lengths(path))
    useful = computed = pairs = computed_pairs = 0
    for first in range(0, len(lengths) - BATCH + 1, BATCH):
        samples = [_sample(n, int(rng.integers(5, most + 1))) for n in lengths[first : first + BATCH]]
        sizes = [len(s) for s in samples]
        useful += sum(sizes)
        pairs += sum(n * (n + 1) // 2 for n in sizes)
        for members in micro_batches(sizes, BUDGET):
            batch = pack([samples[i] for i in members], BATCH, 1)
            computed += len(batch.input_ids)
            computed_pairs += _pairs(batch.lengths)
    return {
        "prompts": path.name,
        "longest": int(max(lengths)),
        "computed / useful tokens": computed / useful,
        "computed / causal pairs": computed_pairs / pairs,
    }


def _pairs(lengths: tuple[int, ...]) -> int:
    """Query-key pairs that attention on a CPU computes for one pack: full squares; short sequences padded in groups."""
    if not short(lengths, torch.float32):
        return sum(n * n for n in lengths)
    return sum(len(g.members) * g.longest**2 for g in length_groups(lengths))


def _sample(prompt: int, completion: int) -> TrainingSequence:
    ids = np.zeros((completion, 1), dtype=np.int32)
    logprobs = np.zeros((completion, 1), dtype=np.float32)
    rollout = Rollout(np.zeros(prompt, np.int32), ids[:, 0], logprobs[:, 0], ((0, 0, completion),), "stop")
    return sequence_of(SampleId(0, 0, 0, 0), rollout, TeacherScores(ids, logprobs, logprobs[:, 0], 0))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", nargs="?", type=Path)
    more = parser.parse_args().prompts
    rows = [row(TOOLS, 32), *([row(more, 128)] if more else [])]
    report("packing", f"Packing, batches of {BATCH}, at most {BUDGET} tokens a forward", rows)


if __name__ == "__main__":
    main()
