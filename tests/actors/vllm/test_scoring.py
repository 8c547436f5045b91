"""Requests for scores, and how both of vLLM's model runners compute them: completion rows only, at a temperature."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.outputs import LogprobsTensors

from sdft.actors.vllm import compat_scoring
from sdft.actors.vllm.compat_scoring import Reading, score_by, scored
from sdft.actors.vllm.scoring import first_row, given_ids, scoring_request, temperature

V, S, K, PROMPT, COMPLETION, CACHED, HEAT = 40, 3, 4, 7, 9, 4, 0.5
READING = Reading(first_row, given_ids, temperature)
LENGTHS = (PROMPT + COMPLETION, 12, PROMPT + 5)  # of three requests' tokens


def forward() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits after each token of each request [3, 20, V], and the tokens [3, 20]."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 20, V, generator=g) * 3, torch.randint(V, (3, 20), generator=g)


def given_of(logits: torch.Tensor) -> torch.Tensor:
    """Return some tokens for each row [T, S], of which some are among the likeliest."""
    return torch.stack([row.topk(10).indices[[0, 2, 9]] for row in logits]).int()


@pytest.mark.parametrize("rows", [1, COMPLETION])
def test_given_tokens_reach_the_runner(rows: int) -> None:
    given = given_of(forward()[0][0][:rows]).numpy()
    request = scoring_request(PROMPT, S + K, given, HEAT)
    assert (first_row(request), request.prompt_logprobs, temperature(request)) == (PROMPT - 1, S + K, HEAT)
    found = given_ids(request)
    assert found is not None
    assert found.tolist() == given.tolist()
    assert (given_ids(scoring_request(PROMPT, K)), temperature(scoring_request(PROMPT, K))) == (None, 1.0)
    assert first_row(SamplingParams()) is None


@pytest.mark.parametrize("k", [0, K])
@pytest.mark.parametrize("heat", [1.0, HEAT])
def test_a_row_has_the_token_the_given_ones_and_the_top_of_the_others(k: int, heat: float) -> None:
    logits, tokens = forward()[0][0], forward()[1][0]
    given = given_of(logits)
    found = scored(logits, tokens, given, S + k, heat)
    plain = torch.log_softmax(logits / heat, -1)
    assert found.logprob_token_ids.dtype == torch.int32
    assert torch.equal(found.logprob_token_ids[:, 0].long(), tokens)
    assert torch.equal(found.logprob_token_ids[:, 1 : 1 + S], given)
    torch.testing.assert_close(found.logprobs, plain.gather(1, found.logprob_token_ids.long()))
    for row, ids in enumerate(found.logprob_token_ids[:, 1 + S :].tolist()):
        left = [i for i in plain[row].argsort(descending=True).tolist() if i not in given[row].tolist()]
        assert ids == left[:k]


class Runner:
    """vLLM's V1 runner in the middle of a forward: CACHED tokens of each prompt are from the cache."""

    def __init__(self, requests: dict[str, SamplingParams]) -> None:
        self.logits, self.tokens = forward()
        names = list(requests)
        of = zip(names, LENGTHS, strict=True)
        self.num_prompt_logprobs = {n: p.prompt_logprobs for n, p in requests.items() if p.prompt_logprobs is not None}
        self.requests = {
            name: SimpleNamespace(
                prompt_token_ids=self.tokens[i, :length].tolist(),
                sampling_params=requests[name],
                num_computed_tokens=CACHED,
            )
            for i, (name, length) in enumerate(of)
        }
        starts = np.cumsum([0, *(length - CACHED for length in LENGTHS)])
        self.query_start_loc = SimpleNamespace(np=starts)
        self.input_batch = SimpleNamespace(req_id_to_index={name: i for i, name in enumerate(names)})
        self.model = SimpleNamespace(compute_logits=lambda rows: rows)
        self.hidden = torch.cat([self.logits[i, CACHED:length] for i, length in enumerate(LENGTHS)])

    def _get_prompt_logprobs_dict(self, hidden_states: Any, scheduled: Any) -> Any:
        raise NotImplementedError

    def scores(self) -> dict[str, LogprobsTensors]:
        return dict(self._get_prompt_logprobs_dict(self.hidden, dict.fromkeys(self.requests, 1)))


class Worker:
    """The part of vLLM's V2 runner that has the prompts' log-probs. It notes what it is given."""

    def __init__(self) -> None:
        self.added: list[SamplingParams] = []

    def add_request(self, request_id: str, index: int, params: SamplingParams) -> None:
        self.added.append(params)

    def remove_request(self, request_id: str) -> None: ...

    def compute_prompt_logprobs(self, *given: Any) -> dict[str, Any]:
        return {"a user's": "vLLM's own"}


def by_v2(requests: dict[str, SamplingParams]) -> tuple[dict[str, Any], Worker]:
    """Score by the V2 runner, which numbers its requests in another order than a batch has them."""
    plain, worker = Runner(requests), Worker()
    score_by(SimpleNamespace(prompt_logprobs_worker=worker), READING)
    indices = dict(zip(requests, (2, 0, 1), strict=True))
    for name, params in requests.items():
        worker.add_request(name, indices[name], params)
    all_ids, lengths = torch.zeros(3, 20, dtype=torch.int32), np.zeros(3, dtype=np.int64)
    for i, name in enumerate(requests):
        all_ids[indices[name]], lengths[indices[name]] = plain.tokens[i], LENGTHS[i]
    batch = SimpleNamespace(
        req_ids=list(requests),
        idx_mapping_np=np.array(list(indices.values())),
        query_start_loc_np=plain.query_start_loc.np,
        num_computed_prefill_tokens_np=np.full(3, CACHED),
    )
    given = (lambda rows: rows, plain.hidden, batch, all_ids, None, lengths)
    found = worker.compute_prompt_logprobs(*given)
    assert worker.compute_prompt_logprobs(*given) == {"a user's": "vLLM's own"}  # a request is scored once
    return found, worker


def requests(rows: int) -> dict[str, SamplingParams]:
    """Requests for the top K, for nothing, and for given tokens and the top K of the others at a temperature."""
    given = given_of(forward()[0][2][:rows]).numpy()
    return {
        "top": scoring_request(PROMPT, K),
        "none": SamplingParams(),
        "given": scoring_request(PROMPT, S + K, given, HEAT),
    }


@pytest.mark.parametrize("rows", [1, 5])
def test_both_runners_score_the_rows_of_completions(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat_scoring, "SCORED_AT_ONCE", 4)
    logits, tokens = forward()
    wanted = requests(rows)
    v1 = Runner(wanted)
    score_by(v1, READING)
    first, (second, worker) = v1.scores(), by_v2(wanted)
    assert [params.prompt_logprobs for params in worker.added] == [None] * 3  # vLLM's own method has nothing to do
    assert second.pop("a user's") == "vLLM's own"
    assert first.keys() == second.keys() == {"top", "given"}
    at = given_ids(wanted["given"])
    for name, i, given, width, heat in (("top", 0, None, K, 1.0), ("given", 2, at, S + K, HEAT)):
        place = slice(PROMPT - 1, LENGTHS[i] - 1)
        plain = scored(logits[i, place], tokens[i, PROMPT : LENGTHS[i]], given, width, heat)
        assert len(plain.logprobs) == LENGTHS[i] - PROMPT
        for found in (first[name], second[name]):
            for ours, theirs in zip(found[:3], plain[:3], strict=True):
                assert torch.equal(ours, theirs), name


def test_a_request_that_is_removed_is_not_scored() -> None:
    worker = Worker()
    score_by(SimpleNamespace(prompt_logprobs_worker=worker), READING)
    worker.add_request("gone", 0, scoring_request(PROMPT, K))
    worker.remove_request("gone")
    batch = SimpleNamespace(req_ids=["gone"])
    assert worker.compute_prompt_logprobs(None, None, batch, None, None, None) == {"a user's": "vLLM's own"}


def test_a_runner_of_another_kind_is_refused() -> None:
    with pytest.raises(RuntimeError, match="vLLM's object has no method for log-probs of prompts that is known here"):
        score_by(object(), READING)
