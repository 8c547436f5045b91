"""What `sdft serve` is given: a run is served on from its newest checkpoint, as its last stage trained."""

from pathlib import Path

from sdft.services.config.load import load_config
from sdft.services.serving.check import check_service
from sdft.services.serving.target import service_of


def test_a_run_is_served_on(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    _, run = undisturbed
    before = sorted(path.name for path in run.iterdir())
    config, folder = service_of(run, ["service.window.epochs=3"], tmp_path / "service")
    of_run = load_config(run / "config.yaml").tasks[-1]
    assert config.service is not None
    assert (config.training.epochs, config.training.batch_size) == (3, of_run.training.batch_size)
    assert (config.method, config.learner, config.sampling) == (of_run.method, of_run.learner, of_run.sampling)
    assert config.data is not None
    assert (config.data.train, config.data.template) == ("inbox", of_run.data.template)
    student = max((run / "checkpoints").glob("step-*")) / "student"
    assert (Path(config.model) / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
    checked = check_service(config, folder)
    assert checked.prepared.model == Path(config.model)
    assert sorted(path.name for path in run.iterdir()) == before  # the run is as it was
