"""An update that does not reach a state-space layer is found by the probe."""

from pathlib import Path

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from sdft.actors.shared.types import Snapshot, WeightMismatch
from sdft.actors.worker import EngineWorker
from sdft.learner.model.stored import Stored
from sdft.learner.weights.content import Content
from sdft.learner.weights.publisher import Publisher
from tests.actors.vllm.test_engine import PROBE, engine_settings
from tests.models.families import FAMILIES, make_family_model


def test_stale_states_of_a_hybrid_are_refused(ray_cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """The same engine takes an update in which these layers have not changed."""
    folder = make_family_model(FAMILIES["Falcon-H1"], tmp_path / "m", tiny_model)
    settings = engine_settings(folder, "tests.fakes.stale_states.Extension")
    engine = ray.remote(EngineWorker).options(num_cpus=0.5).remote(settings)
    ray.get(engine.start.remote(), timeout=300)
    publisher = Publisher(folder, torch.float32, PROBE, "")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored, nbytes = Stored(model), sum(p.nbytes for p in model.parameters())

    def snapshot(version: int) -> Snapshot:
        weights = ((name, parameter.detach()) for name, parameter in model.named_parameters())
        return publisher.publish("student", version, Content(stored.of(weights), nbytes))

    report = ray.get(engine.update_weights.remote(snapshot(1)), timeout=60)
    assert report.probe_gap < 1e-4
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "D", "dt_bias")):
                parameter.add_(1.0)
    with pytest.raises(WeightMismatch):
        ray.get(engine.update_weights.remote(snapshot(2)), timeout=60)
    ray.get(engine.stop.remote(), timeout=60)
