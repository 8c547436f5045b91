"""An algorithm of a user's own: found by its import path, with its settings; what is wrong with it in a sentence."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.actors.shared.drafts import Draft
from sdft.services.algorithms.base import Group
from sdft.services.algorithms.sdft import Sdft
from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config, resolved_yaml
from sdft.services.config.run import RunConfig
from simulation.cluster import Case, Student, Teacher
from tests.services.algorithms.batches import first_batch

HERE = Path(__file__).parent
LEAST = {"model": "m", "data": {"train": "t.jsonl"}, "training": {"steps": 1}}


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE)


def config(**settings: Any) -> RunConfig:
    return RunConfig.model_validate_json(json.dumps(LEAST | settings), strict=True)


@pytest.mark.usefixtures("own_folder")
def test_an_own_algorithm_has_its_settings_and_survives_a_round_trip(tmp_path: Path) -> None:
    given = config(method={"type": "siblings:Siblings", "sure": True, "skip_first": 0})
    assert (type(given.method).__name__, given.method.skipped) == ("Siblings", 0)
    path = tmp_path / "config.yaml"
    path.write_text(resolved_yaml(given))
    assert load_config(path) == given


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (
            {"type": "siblings:Sibling"},
            "siblings:Sibling cannot be imported (AttributeError: module 'siblings' has no attribute",
        ),
        (
            {"type": "nowhere:Siblings"},
            "nowhere:Siblings cannot be imported (ModuleNotFoundError: No module named 'nowhere'); write it as",
        ),
        ({"type": "siblings:Group"}, "siblings:Group is not a subclass of sdft.services.algorithms.base.Algorithm"),
        ({"type": "siblings:Siblings", "shure": True}, "method.shure: Extra inputs are not permitted"),
        ({"type": "recall"}, "method.prompts is required but missing"),
        (
            {"type": "recall", "prompts": "p"},
            "method recall needs teacher.weights: base or external, not ema; change one of them",
        ),
        (
            {"type": "sft", "skip_first": 0},
            "method.skip_first is not a setting with type: sft; only sdft and off_policy and recall and sdpo and "
            "hindsight and mix have it",
        ),
        (
            {"divergence": {"type": "sampled", "top_k": 8}},
            "method.divergence.top_k is not a setting with type: sampled; only forward and reverse and jsd have it",
        ),
        (
            {"divergence": {"type": "jsd", "clip": 0.7}},
            "method.divergence: clip 0.7 has no effect: with beta 0.5 no token's divergence is more than 0.693; lower",
        ),
        (
            {"length": 256},
            "method.length 256 has no effect: no completion is longer than 256 tokens; lower it, or remove it",
        ),
        (
            {"divergence": {"type": "forward", "support": "full", "top_k": 8}},
            "method.divergence: top_k 8 has no effect with support full, which has all tokens; remove it",
        ),
        (
            {"divergence": {"type": "forward", "support": "student", "top_k": None}},
            "method.divergence: support student needs top_k; set it, or set support: full",
        ),
        (
            {"divergence": {"type": "sampled", "support": "full"}},
            "method.divergence.support is not a setting with type: sampled; only forward and reverse and jsd have it",
        ),
        (
            {"type": "off_policy", "divergence": {"support": "union"}},
            "method: divergence.support union is of the student's samples, and method off_policy has none; set support",
        ),
        ({"type": "sft", "entropy": 0.1}, "method.entropy is not a setting with type: sft; only sdft and off_policy"),
        (3, "method must be text or a mapping of settings, not 3"),
    ],
)
def test_a_method_that_means_nothing_is_refused(tmp_path: Path, method: Any, reason: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps(LEAST | {"method": method}))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert reason in str(error.value)


def test_the_section_that_the_losses_had_is_refused_with_the_new_keys(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    stage = {"name": "a", "data": {"train": "t"}, "steps": 1, "loss": {"top_k": 8}}
    for settings in (LEAST | {"loss": {"top_k": 8}}, {"model": "m", "training": {}, "stages": [stage]}):
        path.write_text(json.dumps(settings))
        with pytest.raises(UserError, match="loss is not a setting any more; it is part of method"):
            load_config(path)


def test_an_override_completes_the_short_form_of_a_method(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(json.dumps(LEAST | {"method": "off_policy"}))
    loaded = load_config(path, ["method.skip_first=1", "method.divergence.top_k=8"])
    (loss,) = loaded.method.losses
    assert (loaded.method.type, loaded.method.skipped, loss.divergence.scored) == ("off_policy", 1, ("teacher", 8, 1.0))


class Patient(Sdft):
    """SDFT that also awaits something else than the engines, as an own algorithm may."""

    async def make(self, group: Group, student: Any, teacher: Any) -> list[Draft]:
        await asyncio.sleep(1)
        return await super().make(group, student, teacher)


@pytest.mark.parametrize("staleness", [0, 1])
def test_an_own_make_of_a_subclass_may_await_anything(tmp_path: Path, staleness: int) -> None:
    case = Case("patient", engines=2, staleness=staleness, steps=1)
    batch, counts = first_batch(tmp_path, case, Patient(), lambda number: Student(number, case), Teacher)
    assert (len(batch.drafts), counts) == (16, {"scored": 16})


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_teachers_temperature_reaches_its_engines(tmp_path: Path, staleness: int) -> None:
    heats: list[float] = []

    class Watched(Teacher):
        def score_completions(self, items: Any, support: Any) -> Any:
            heats.append(support.temperature)
            return super().score_completions(items, support)

    case = Case("sharp", engines=1, staleness=staleness, steps=1)
    sharp = {"teacher": {"temperature": 0.5}}
    first_batch(tmp_path, case, {"type": "sdft"}, lambda n: Student(n, case), Watched, sections=sharp)
    assert set(heats) == {0.5}


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("staleness", [0, 1])
def test_samples_without_a_sequence_are_dropped_and_siblings_see_each_other(tmp_path: Path, staleness: int) -> None:
    case = Case("siblings", engines=2, staleness=staleness, steps=1)
    shown: list[str] = []

    class Watched(Teacher):
        def score(self, pairs: list[Any], k: int) -> Any:
            shown.extend(bytes(prompt.astype(np.uint8)).decode() for prompt, _ in pairs)
            return super().score(pairs, k)

    class Half(Student):
        """Ends every other completion by itself."""

        def generate(self, items: Any, argument: Any) -> Any:
            took, rollouts = super().generate(items, argument)
            ends = ("stop" if item.seed % 2 else "length" for item in items)
            return took, [replace(rollout, finish_reason=end) for rollout, end in zip(rollouts, ends, strict=True)]

    method = {"type": "siblings:Siblings", "sure": True}
    batch, counts = first_batch(tmp_path, case, method, lambda number: Half(number, case), Watched)
    by_sample = {draft.sample: draft for draft in batch.drafts}
    siblings = {s: s._replace(generation=1 - s.generation) for s in by_sample}
    assert 0 < len(batch.drafts) < 16
    assert all(
        by_sample[other].turns[-1].completion.finish_reason == "stop"
        for other in siblings.values()
        if other in by_sample
    )
    assert counts == {"scored": len(batch.drafts), "dropped": 16 - len(batch.drafts)}
    assert len(shown) == len(batch.drafts)
    assert all(text.endswith(" tokens") for text in shown)
