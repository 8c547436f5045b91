"""The snapshots that the learner publishes, and the buffers that they are packed into.

A buffer on a GPU is tested on the CPU: only its pinning and its handle need a GPU (tests/runs/test_gpu.py).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
import xxhash
from transformers import AutoModelForCausalLM

from sdft.actors.shared.digests import PIECE, check_digests, digest
from sdft.actors.shared.packed import unpack
from sdft.actors.shared.sums import damaged
from sdft.actors.shared.types import SnapshotDamaged
from sdft.learner.weights import buffers
from sdft.learner.weights.buffers import GpuMemory, HostMemory, copy_tensors
from sdft.learner.weights.content import Content
from sdft.learner.weights.publisher import Publisher

CPU = torch.device("cpu")
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
    memory = torch.zeros(sum(tensor.nbytes for _, tensor in given), dtype=torch.uint8)
    entries = copy_tensors(given, memory, threads)
    for (name, tensor), e in zip(given, entries, strict=True):
        raw = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert (e.name, e.dtype, e.shape) == (name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        assert (e.offset, e.nbytes, e.digest) == (offset, len(raw), xxhash.xxh3_128_hexdigest(raw))
        assert memory[offset : offset + len(raw)].numpy().tobytes() == raw
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

    monkeypatch.setattr(buffers, "digest", slowly)
    payload = torch.zeros(PIECE + 1, dtype=torch.uint8)
    assert [e.name for e in copy_tensors(made(), payload, threads=1)] == ["first", "second"]


def test_a_buffer_on_a_gpu_has_the_same_bytes_and_its_own_digests() -> None:
    """What an engine's worker does with it: compare the digests, then load views of it. Each version is packed anew."""
    given = weights()
    nbytes = sum(tensor.nbytes for _, tensor in given)
    ours, host = GpuMemory(nbytes, CPU), HostMemory("test", nbytes, CPU)
    payload = ours.payload
    for version in (given, [(name, tensor + 1) for name, tensor in given]):
        entries, of_host = ours.fill(version), host.fill(version)
        assert [replace(e, digest="") for e in entries] == [replace(e, digest="") for e in of_host]
        assert torch.equal(payload, host.payload)
        assert damaged(payload, entries) is None
        for (name, tensor), (loaded, view) in zip(version, unpack(payload, entries), strict=True):
            assert name == loaded
            assert torch.equal(tensor, view)
            assert view.untyped_storage().data_ptr() == payload.data_ptr()
        payload[entries[5].offset + 3] ^= 1
        assert damaged(payload, entries) == "t5"


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
def test_a_snapshot_on_a_gpu_is_the_one_in_main_memory_with_other_digests(tiny_model: Path, adapters: bool) -> None:
    """Also as an engine on another node gets it: copied into main memory, where its digests are checked too."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    content = Content(model.named_parameters(), sum(p.nbytes for p in model.parameters()))
    if adapters:
        g = torch.Generator().manual_seed(0)
        name = "model.layers.0.self_attn.q_proj"
        width, out = model.get_submodule(name).in_features, model.get_submodule(name).out_features
        pair = {"A": torch.randn(4, width, generator=g), "B": torch.randn(out, 4, generator=g)}
        named = [(f"{name}.lora_{part}.weight", tensor) for part, tensor in pair.items()]
        content = Content(named, sum(tensor.nbytes for _, tensor in named), scale=0.5)
    ids = np.arange(9, dtype=np.int32)
    content = replace(content, weights=list(content.weights))
    host = Publisher(tiny_model, torch.float32, ids, "here")
    ours = Publisher(tiny_model, torch.float32, ids, "here", on_gpu=True)
    expected, snapshot = host.publish("student", 3, content), ours.publish("student", 3, content)
    assert (snapshot.version, snapshot.path, snapshot.node, snapshot.scale) == (3, "", "here", content.scale)
    np.testing.assert_array_equal(snapshot.probe_logprobs, expected.probe_logprobs)
    base = host.publish("teacher", 4, Content(model.named_parameters(), sum(p.nbytes for p in model.parameters())))
    assert (np.abs(snapshot.probe_logprobs - base.probe_logprobs).max() > 1e-3) == adapters
    assert {e.digest[:4] for e in snapshot.tensors} == {"sum:"}
    raw = ours.host_bytes("student")
    check_digests(snapshot, raw.data, threads=2)
    raw[snapshot.tensors[1].offset] ^= 1
    with pytest.raises(SnapshotDamaged, match=snapshot.tensors[1].name):
        check_digests(snapshot, raw.data, threads=2)
