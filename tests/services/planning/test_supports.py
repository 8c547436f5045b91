"""Supports that cannot be scored are refused before any process starts, and their memory is in the plan."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.actors.shared.types import Rollout, Support
from sdft.actors.worker import scored
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.planning.plan import engine_settings, make_plan
from sdft.services.planning.shape import ModelShape
from sdft.services.planning.supports import check_engines_score, check_supports
from tests.fakes.echo_engine import EchoEngine

VOCABULARY = 49152
SMOLLM2 = ModelShape(134_515_008, layers=30, hidden=576, intermediate=1536, vocabulary=VOCABULARY, heads=9)
ECHO = "tests.fakes.echo_engine:EchoEngine"


def config(divergence: Mapping[str, object], **sections: object) -> RunConfig:
    given = {"model": "m", "dtype": "float32", "data": {"train": "t"}, "training": {"steps": 1, "batch_size": 8}}
    method = {"type": "sdft", "divergence": divergence}
    return RunConfig.model_validate(given | {"method": method, "sampling": {"max_new_tokens": 64}} | sections)


def test_full_support_is_refused_above_a_size_with_what_helps() -> None:
    full = {"support": "full"}
    check_supports(config(full), VOCABULARY)
    check_supports(config({}, sampling={"max_new_tokens": 4096}), VOCABULARY)
    with pytest.raises(UserError, match=r"full is 12.0 GiB of scores a step.*set support: teacher"):
        check_supports(config(full, sampling={"max_new_tokens": 4096}), VOCABULARY)
    check_supports(config(full, sampling={"max_new_tokens": 4096}), 512)


def test_an_engine_of_a_users_own_that_scores_no_given_tokens_is_refused() -> None:
    actors = {"teacher": {"engine": ECHO}}
    check_engines_score(config({}, actors=actors))
    check_engines_score(config({"support": "full"}, actors={"student": {"engine": ECHO}}))  # it does not score
    for support in ({"support": "full"}, {"support": "student"}):
        with pytest.raises(
            UserError, match=f"actors.teacher.engine: {ECHO} lacks score_at .*support {support['support']}"
        ):
            check_engines_score(config(support, actors=actors))
    with pytest.raises(UserError, match=r"actors\.student\.engine"):
        check_engines_score(
            config({"support": "union"}, actors={"student": {"engine": ECHO}}, teacher={"weights": "live"})
        )


def test_an_engine_of_a_users_own_that_takes_no_temperature_is_refused() -> None:
    engine = "tests.services.planning.test_supports:Cold"
    check_engines_score(config({}, actors={"teacher": {"engine": engine}}))
    check_engines_score(config({}, actors={"teacher": {"engine": ECHO}}, teacher={"temperature": 0.7}))
    with pytest.raises(UserError, match=f"teacher.engine: {engine} scores without a temperature.* is 0.7; take it"):
        check_engines_score(config({}, actors={"teacher": {"engine": engine}}, teacher={"temperature": 0.7}))


def test_an_engine_without_a_temperature_scores_at_1() -> None:
    """It gets no argument that it does not know."""
    rollout = Rollout(np.arange(3, dtype=np.int32), np.arange(2, dtype=np.int32), np.zeros(2, np.float32), (), "stop")
    cold = Cold.__new__(Cold)  # it reads no settings to score
    (scores,) = asyncio.run(scored(cold, [rollout.prompt_ids], [rollout], Support("teacher", 4)))
    assert scores.ids.shape == (2, 4)
    with pytest.raises(TypeError, match="temperature"):
        asyncio.run(scored(cold, [rollout.prompt_ids], [rollout], Support("teacher", 4, 0.7)))


class Cold(EchoEngine):
    """An engine that scores at temperature 1."""

    async def score(self, pairs: Any, k: int) -> Any:  # type: ignore[override]
        return await super().score(pairs, k)


def test_engines_return_as_many_log_probs_as_a_support_has(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for of, most in (("teacher", 8), ("student", 8), ("union", 16), ("full", VOCABULARY)):
        given = config({"support": of, "top_k": None if of == "full" else 8})
        assert engine_settings(given, tmp_path, "teacher", VOCABULARY).max_logprobs == most


def test_the_memory_of_the_scores_is_in_the_plan() -> None:
    """8 completions of 64 tokens and a vocabulary of 49152: 0.19 GiB as ids and log-probs."""
    scores = 8 * 64 * VOCABULARY * 8 / 2**30
    top, full = (make_plan(config(d), SMOLLM2, [100]) for d in ({}, {"support": "full"}))
    recording = make_plan(config({"support": "full"}, monitoring={"record_rollouts": True}), SMOLLM2, [100])
    assert top.held_gib < 0.001
    assert full.held_gib == pytest.approx(scores)
    assert recording.held_gib == pytest.approx(3 * scores)
    more = {name: full.pools[name][0].memory_gib - top.pools[name][0].memory_gib for name in ("student", "teacher")}
    assert more == pytest.approx({"student": 0, "teacher": 4 * scores}, rel=0.01)
    assert full.learners[0].memory_gib - top.learners[0].memory_gib > 3 * scores
    assert full.memory_gib - top.memory_gib > 8 * scores
