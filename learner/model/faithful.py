"""Check that the learner's forward of a model equals the model's own: a pack of short sequences against each alone.

packed, twice, as in training  ─┬─►  equal both times?                             no: a part of the model is random
                                └─►  log-probs equal to transformers' own forward? no: a part of the model is left out
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sdft.actors.shared.process import GIB, available_memory_gib
from sdft.learner.loss.scaling import LogitScaling
from sdft.learner.model.architecture import BROKEN, Untrainable
from sdft.learner.model.cpu.last_layer import rows_computed
from sdft.learner.model.forward import hidden_states, one_line, packs

LENGTHS = (9, 5)
STRIDE = 7919  # a prime: neighbouring tokens are far apart in any vocabulary
# Largest allowed difference of a log-prob, in float32. Rounding causes 1e-6 in tiny models and 5e-5 in SmolLM2-135M.
# Leaving attention sinks or ALiBi out of tiny random models causes 0.01 and more.
BOUND = 2e-3
BOUND_IN_HALF = 0.2  # the same in bfloat16, in which correct engines differ by up to 0.04


@torch.no_grad()
def unfaithful(model: PreTrainedModel) -> str | None:
    """Return how the learner's forward differs from the model's, as the end of a sentence, or None if it does not.

    Computes on a CPU: in float32 if the float32 weights fit into half of the free memory, otherwise in the model's
    dtype. Leaves the model and torch's random generators unchanged.
    """
    room = 4 * model.num_parameters() < available_memory_gib() * GIB / 2
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, sum(LENGTHS) + 1) * STRIDE % vocabulary
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    read = (positions >= 3).nonzero()[:, 0]
    try:
        with torch.random.fork_rng(devices=[]), _in_float32(model) if room else nullcontext():
            with rows_computed(model) as rows:
                once, again = (_log_probs(model, hidden_states(model, ids, positions, LENGTHS, read)) for _ in range(2))
            with _as_evaluated(model):
                expected = torch.cat([_own_log_probs(model, sequence) for sequence in ids.split(LENGTHS)])[read]
    except Untrainable as error:
        return str(error)
    except (*BROKEN, RuntimeError) as error:
        return f"its forward fails ({one_line(error)})"
    if not torch.equal(once, again):
        return (
            "the same input gives different outputs each time: a part of its training mode is random, such as dropout"
        )
    gap = float((once - expected).abs().max())
    if not gap <= (BOUND if room or model.dtype == torch.float32 else BOUND_IN_HALF):  # true for NaN too
        return (
            f"the learner does not compute a part of it: its log-probs differ by up to {gap:.2g} from those of "
            f"transformers' own forward"
        )
    if packs(model) and any(count != len(read) for count in rows):  # correct, but slower without a word
        return (
            "its layers do not pass the argument `read` on, so the last feed-forward network would compute rows that "
            "no loss reads"
        )
    return None


def _log_probs(model: PreTrainedModel, states: Tensor) -> Tensor:
    head = model.get_output_embeddings()
    logits = LogitScaling.of(model.config).apply_(torch.nn.functional.linear(states, head.weight, head.bias))
    return torch.log_softmax(logits.float(), -1)


def _own_log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probs of one sequence by the model's own forward and head: ids [N] -> [N, V]."""
    return torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0].float(), -1)


@contextmanager
def _as_evaluated(model: PreTrainedModel) -> Iterator[None]:
    """Use eager attention and no dropout inside the block, because rollouts are sampled without dropout."""
    attention = model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        model.train()


@contextmanager
def _in_float32(model: PreTrainedModel) -> Iterator[None]:
    weights = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in weights:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in weights:
            parameter.data = data
