"""The README is true: the section on own data is run line by line, and its other commands parse."""

import subprocess
from pathlib import Path

import yaml

from sdft.services.cli.main import parser
from sdft.services.config.run import RunConfig
from sdft.services.records.rows import read_jsonl
from tests.papers.readme import ROOT, blocks, commands
from tests.runs.run import ENVIRONMENT


def block(beginning: str) -> str:
    (found,) = [b for b in blocks() if b.startswith(beginning)]
    return found + "\n"


def test_own_data_does_what_the_readme_says(tiny_model: Path, tmp_path: Path) -> None:
    """Every command is unchanged. The built-in model is replaced by the tiny one, and the rows are repeated."""
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m").symlink_to(tiny_model)
    work = tmp_path / "work"
    work.mkdir()
    (work / "my.jsonl").write_text(block('{"prompt": "Turn off') * 8)
    (work / "my-test.jsonl").write_text(block('{"prompt": "Light on') * 3)
    (work / "my.yaml").write_text(block("model: smollm2-135m"))
    environment = ENVIRONMENT | {"SDFT_CACHE": str(tmp_path / "cache")}
    outputs = {}
    own_data = [c for c in commands("sdft") if c[1] not in ("submit", "matrix") and "--append" not in c]
    assert [c[1] for c in own_data] == ["check", "train", "train", "status", "report", "export", "eval"]
    for command in own_data:
        result = subprocess.run(
            command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        outputs[command[1]] = result.stdout
        if "--dry-run" in command:
            assert "skip_first: 3" in result.stdout
            assert not (work / "runs").exists()
    assert "8 demonstrations" in outputs["check"]
    assert "finished" in outputs["status"]
    assert "4 of 4" in outputs["status"]
    for name in ("config.yaml", "metrics.jsonl", "eval.jsonl", "ledger.sqlite", "checkpoints/", "report.html", "logs/"):
        assert f"`{name}`" in (ROOT / "README.md").read_text()
        assert (work / "runs" / "my" / name).exists()
    # The exported student gives the replies of the run's last evaluation.
    given, *answers = read_jsonl(work / "answers.jsonl")
    last = [row for row in read_jsonl(work / "runs" / "my" / "eval.jsonl") if row["metric"] == "accuracy"][-1]
    assert (given["value"], given["n"]) == (last["value"], 3)
    texts = {row["id"]: row["text"] for row in read_jsonl(work / "runs" / "my" / "samples.jsonl") if row["step"] == 4}
    assert {row["id"]: row["text"] for row in answers} == texts


def test_the_stream_of_the_readme_is_a_configuration() -> None:
    """The configuration is valid and the commands parse. test_run.py appends a stage and reads a matrix."""
    start = {"model": "m", "training": {"batch_size": 8}}
    sets = {"evaluation": {"sets": [{"name": "g", "file": "g.jsonl", "grader": "exact", "role": "retention"}]}}
    config = RunConfig.model_validate(start | sets | yaml.safe_load(block("stages:")))
    assert [(task.training.epochs, task.training.steps) for task in config.tasks] == [(2, None), (None, 80)]
    assert config.guarded == ("g",)
    others = [c for c in commands("sdft") if c[1] == "matrix" or "--append" in c]
    assert [c[1] for c in others] == ["matrix", "matrix", "train"]
    for words in others:
        assert parser().parse_args(words[1:]).run is not None


def test_the_cluster_blocks_of_the_readme_are_valid_configurations() -> None:
    run = {"model": "m", "data": {"train": "t"}, "training": {"steps": 1}}
    shared = RunConfig.model_validate(run | yaml.safe_load(block("device: cuda")))
    assert shared.learner.gpus + shared.actors.student.gpus + shared.actors.teacher.gpus == 1
    elastic = yaml.safe_load(block("training: {max_staleness"))
    assert RunConfig.model_validate(run | elastic | {"training": elastic["training"] | {"steps": 1}}).ray.autoscaling


def test_the_make_targets_of_the_readme_exist() -> None:
    assert {c[1] for c in commands("make")} == {"demo", "test", "chaos", "bench"}
    for command in commands("make"):
        subprocess.run([*command, "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60)
