"""The snapshots that the learner publishes."""

import mmap
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

from sdft.actors.shared.digests import PIECE, digest
from sdft.learner.weights import publisher as publishing
from sdft.learner.weights.content import Content
from sdft.learner.weights.publisher import Publisher, copy_tensors

SHAPES = ((3,), (PIECE - 7,), (5,), (0, 4), (), (2, PIECE), (9, 2))  # numbers: several pieces, and a rest


def test_a_snapshot_that_cannot_be_probed_does_not_block_the_next(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = dict(model.named_parameters())
    nbytes = sum(p.nbytes for p in weights.values())
    publisher = Publisher(tiny_model, torch.float32, np.arange(9, dtype=np.int32), "")
    norm = weights["model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"size of tensor"):
        publisher.publish("student", 0, Content((weights | {"model.norm.weight": norm[:5]}).items(), nbytes))
    snapshot = publisher.publish("student", 0, Content(weights.items(), nbytes))
    assert np.isfinite(snapshot.probe_logprobs).all()


def test_the_probe_is_computed_over_the_tokens_of_the_tokenizer(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = np.arange(9, dtype=np.int32)
    nbytes = sum(p.nbytes for p in model.parameters())
    snapshot = Publisher(tiny_model, torch.float32, ids, "", vocabulary=300).publish(
        "student", 0, Content(model.named_parameters(), nbytes)
    )
    with torch.no_grad():
        logprobs = model(torch.from_numpy(ids).long()[None]).logits[0, :-1, :300].log_softmax(-1)
    expected = logprobs.gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0]
    np.testing.assert_allclose(snapshot.probe_logprobs, expected, atol=1e-4)


def weights() -> list[tuple[str, torch.Tensor]]:
    """Return tensors of two dtypes, one of them not contiguous."""
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=g).to(torch.bfloat16) for shape in SHAPES]
    return [*((f"t{i}", tensor) for i, tensor in enumerate(made)), ("t", torch.randn(6, 4, generator=g).T)]


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_tensors_lie_end_to_end_each_with_the_digest_of_its_bytes(threads: int) -> None:
    given, offset = weights(), 0
    memory = mmap.mmap(-1, sum(tensor.nbytes for _, tensor in given))
    entries = copy_tensors(given, memory, threads)
    for (name, tensor), e in zip(given, entries, strict=True):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert (e.name, e.dtype, e.shape) == (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert (e.offset, e.nbytes, e.digest) == (offset, len(raw), xxhash.xxh3_128_hexdigest(raw))
        assert memory[offset : offset + len(raw)] == raw
        offset += len(raw)


def test_a_tensor_is_digested_while_the_next_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Barrier(2)

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        yield "first", torch.zeros(PIECE, dtype=torch.uint8)
        both.wait(timeout=30)  # fails unless the first one is digested meanwhile
        yield "second", torch.zeros(1, dtype=torch.uint8)

    def slowly(data: memoryview) -> str:
        if data.nbytes == PIECE:
            both.wait(timeout=30)
        return digest(data)

    monkeypatch.setattr(publishing, "digest", slowly)
    assert [e.name for e in copy_tensors(made(), mmap.mmap(-1, PIECE + 1), threads=1)] == ["first", "second"]
