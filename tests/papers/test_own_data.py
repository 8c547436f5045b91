"""The README's section on own data is run line by line."""

import subprocess
from pathlib import Path

from sdft.services.records.rows import read_jsonl
from tests.papers.documents import README, block, commands
from tests.runs.run import ENVIRONMENT


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
    own_data = [c for c in commands("sdft") if c[1] != "submit"]
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
        assert f"`{name}`" in README.read_text()
        assert (work / "runs" / "my" / name).exists()
    # The exported student gives the replies of the run's last evaluation.
    given, *answers = read_jsonl(work / "answers.jsonl")
    last = [row for row in read_jsonl(work / "runs" / "my" / "eval.jsonl") if row["metric"] == "accuracy"][-1]
    assert (given["value"], given["n"]) == (last["value"], 3)
    texts = {row["id"]: row["text"] for row in read_jsonl(work / "runs" / "my" / "samples.jsonl") if row["step"] == 4}
    assert {row["id"]: row["text"] for row in answers} == texts
