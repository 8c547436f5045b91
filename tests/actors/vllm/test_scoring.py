"""Requests for scores and how they are read, without an engine: what runners with and without our own scoring get."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.outputs import CompletionOutput, RequestOutput

from sdft.actors.vllm.compat import PromptLogprobs, _at
from sdft.actors.vllm.scoring import first_row, given_ids, given_request, given_scores, without

T, V, S, K, PROMPT = 5, 40, 3, 4, 7


def table() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probs [T, V], the tokens themselves [T], and given tokens [T, S], some of them among the likeliest."""
    g = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(T, V, generator=g) * 3, -1)
    given = torch.stack([logprobs[i].topk(10).indices[[0, 2, 9]] for i in range(T)])
    return logprobs, torch.randint(V, (T,), generator=g), given


@pytest.mark.parametrize("same", [False, True])
def test_given_tokens_reach_the_runner(same: bool) -> None:
    given = table()[2].numpy().astype(np.int32)[: 1 if same else T]
    ours = given_request(PROMPT, T, given, K, own_scores=True)
    assert first_row(ours) == PROMPT - 1
    assert ours.prompt_logprobs == S + K
    found = given_ids(ours)
    assert found is not None
    assert found.tolist() == given.tolist()
    theirs = given_request(PROMPT, T, given, K, own_scores=False)
    assert given_ids(theirs) is None
    assert np.asarray(theirs.prompt_logprob_token_ids).tolist() == np.broadcast_to(given, (T, S)).tolist()
    assert (theirs.prompt_logprob_start, theirs.prompt_logprobs) == (PROMPT - 1, S + K)


@pytest.mark.parametrize("k", [0, K])
def test_both_runners_give_the_same_scores(k: int) -> None:
    """Ours returns the given tokens and the top of the others. V2 returns the top of all, and the given ones apart."""
    logprobs, own, given = table()
    ids = given.numpy().astype(np.int32)
    ours = _at(logprobs, own, given, S + k)
    top = logprobs.topk(S + k if k else 1, -1)
    theirs = PromptLogprobs(
        torch.cat([own[:, None], top.indices], 1).int().numpy(),
        torch.cat([logprobs.gather(1, own[:, None]), top.values], 1).numpy(),
    )
    span = SimpleNamespace(version="7", start=0, end=1)
    completion = CompletionOutput(0, "", [0], None, None, weight_versions=[span])
    found = []
    for prompt_logprobs, own_scores in (
        (PromptLogprobs(ours.logprob_token_ids.numpy(), ours.logprobs.numpy()), True),
        (theirs, False),
    ):
        output = RequestOutput("r", None, None, prompt_logprobs, [completion], True)
        output.prompt_token_id_logprobs = logprobs.gather(1, given).numpy()
        found.append(given_scores(output, T, ids, k, own_scores))
    for a, b in ((found[0].ids, found[1].ids), (found[0].logprobs, found[1].logprobs)):
        assert a.shape == (T, S + k)
        np.testing.assert_array_equal(a, b)
    assert [s.version for s in found] == [7, 7]
    np.testing.assert_array_equal(found[0].sampled, logprobs.gather(1, own[:, None])[:, 0])
    assert all(len(set(row)) == S + k for row in found[0].ids.tolist())


def test_others_keep_their_order() -> None:
    ids, values = np.array([[5, 1, 7, 2]], np.int32), np.array([[-1.0, -2, -3, -4]], np.float32)
    left, of_left = without(ids, values, np.array([[7, 5]], np.int32), 2)
    assert (left.tolist(), of_left.tolist()) == ([[1, 2]], [[-2.0, -4.0]])
