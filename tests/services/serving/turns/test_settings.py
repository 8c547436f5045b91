"""One engine in turns: what a service with it must not have, and what its windows' runs and its engine are given."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sdft.actors.config import TURN_ENGINE
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.config.service import ServingConfig
from sdft.services.serving.check import check_service, engine_settings
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.window import window_run
from tests.models.families import FAMILIES, make_family_model

TURNS = {"serving": {"turns": True}}


def service(folder: Path, model: Path | str, **more: Any) -> RunConfig:
    path = folder / "service.json"
    path.write_text(json.dumps({"model": str(model), "dtype": "float32", "service": TURNS} | more))
    return load_config(path)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"sampling": {"temperature": 0.7}}, "temperature and top_p to 1"),
        ({"sampling": {"top_p": 0.9}}, "temperature and top_p to 1"),
        ({"teacher": {"weights": "external", "model": "other"}}, "teacher.weights: external"),
        ({"weights": {"transport": "broadcast"}}, "weights.transport"),
        ({"ray": {"address": "10.0.0.1:6379"}}, "ray.address"),
        ({"actors": {"student": {"engine": "mine.engines:Mine"}}}, "actors.student.engine"),
        ({"actors": {"student": {"replicas": 2}}}, "actors.student.replicas has no effect"),
        ({"actors": {"teacher": {"kv_cache_gib": 0.5}}}, "actors.teacher.kv_cache_gib has no effect"),
        ({"actors": {"student": {"tensor_parallel": 2}}}, "actors.student.tensor_parallel has no effect"),
    ],
)
def test_what_one_engine_cannot_do_is_refused(more: dict[str, Any], what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"service\.serving\.turns is true") as refused:
        check_service(service(tmp_path, "any", **more), ServiceFolder(tmp_path / "service"))
    assert what in str(refused.value)
    assert not (tmp_path / "service").exists()


@pytest.mark.parametrize("more", [{"replicas": 2}, {"max_replicas": 2}, {"cluster": {"cpus": 1}}])
def test_turns_are_for_one_engine_on_this_machine(more: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="remove cluster, replicas and max_replicas"):
        ServingConfig.model_validate({"turns": True} | more)


def test_the_engine_has_room_for_what_windows_ask_of_it(tiny_model: Path, tmp_path: Path) -> None:
    """It has the length, the log-probs and the ends of a reply of the run, and is the engine of every pool."""
    more: dict[str, Any] = {
        "data": {"max_prompt_tokens": 100, "max_teacher_prompt_tokens": 700},
        "sampling": {"max_new_tokens": 100},
        "method": {"type": "sdft", "divergence": {"top_k": 50}},
        "service": {"serving": {"turns": True, "max_model_len": 256}},
    }
    config = service(tmp_path, tiny_model, **more)
    checked = check_service(config, ServiceFolder(tmp_path / "service"))
    settings = engine_settings(checked, tiny_model)
    assert settings.max_model_len >= 800
    assert settings.max_logprobs >= 50
    assert settings.stop_ids == checked.prepared.stop_ids != ()
    assert settings.shared
    run = window_run(config, str(tiny_model), str(tmp_path / "train.jsonl"))
    assert {(pool.engine, pool.gpus) for pool in run.actors.pools.values()} == {(TURN_ENGINE, 0)}
    alone = service(tmp_path, tiny_model, **more | {"service": {}})
    assert not engine_settings(check_service(alone, ServiceFolder(tmp_path / "alone")), tiny_model).shared
    assert {pool.engine for pool in window_run(alone, "any", "any").actors.pools.values()} == {"vllm"}


def test_the_engine_keeps_the_experts_of_rollouts_where_the_run_replays_them(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_family_model(FAMILIES["OLMoE"], tmp_path / "experts", tiny_model)
    for replayed in (True, False):
        data = {"max_prompt_tokens": 100, "max_teacher_prompt_tokens": 200}
        serving = {"serving": {"turns": True, "max_model_len": 512}}
        learner = {"replay_experts": replayed}
        config = service(tmp_path, folder, learner=learner, data=data, service=serving)
        checked = check_service(config, ServiceFolder(tmp_path / f"service-{replayed}"))
        assert engine_settings(checked, folder).keep_experts == replayed
