"""Whether a run replays the experts of its rollouts: by the model, the device and learner.replay_experts."""

from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.planning.routing import replays_experts


def config(device: str, dtype: str, wanted: bool | None, split: int = 1) -> RunConfig:
    settings: dict[str, Any] = {
        "model": "any",
        "data": {"train": "any.jsonl"},
        "training": {"steps": 1},
        "device": device,
        "dtype": dtype,
        "learner": {"replay_experts": wanted},
        "actors": {"student": {"tensor_parallel": split}},
    }
    return RunConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("device", "dtype", "wanted", "routed", "carries", "replayed"),
    [
        ("cpu", "bfloat16", None, True, False, True),
        ("cpu", "bfloat16", None, True, True, True),
        ("cpu", "bfloat16", None, False, False, False),
        ("cpu", "float32", None, True, False, False),
        ("cpu", "float32", True, True, True, True),
        ("cuda", "bfloat16", None, True, False, False),
        ("cuda", "bfloat16", True, True, False, True),
        ("cuda", "bfloat16", False, True, True, False),
    ],
)
def test_experts_are_replayed_where_rounding_moves_them_or_where_it_is_asked_for(
    device: str, dtype: str, wanted: bool | None, routed: bool, carries: bool, replayed: bool
) -> None:
    assert replays_experts(config(device, dtype, wanted), routed, carries) == replayed


@pytest.mark.parametrize(
    ("device", "routed", "carries", "why"),
    [
        ("cuda", False, False, "the model has no experts"),
        ("cuda", True, True, "convolutions, delta nets or state spaces; remove the key"),
    ],
)
def test_a_replay_that_cannot_be_is_refused(device: str, routed: bool, carries: bool, why: str) -> None:
    with pytest.raises(UserError, match=why):
        replays_experts(config(device, "bfloat16", True), routed, carries)


def test_engines_that_are_split_replay_no_experts() -> None:
    assert not replays_experts(config("cpu", "bfloat16", None, split=2), routed=True, carries=False)
    with pytest.raises(UserError, match=r"actors\.student\.tensor_parallel is 2: .* set tensor_parallel: 1"):
        replays_experts(config("cpu", "bfloat16", True, split=2), routed=True, carries=False)
