"""The snapshots that the learner publishes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sdft.learner.weights.content import Content
from sdft.learner.weights.publisher import Publisher


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
