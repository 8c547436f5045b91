"""lm-eval itself on the tiny model, with a local task: nothing is downloaded."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sdft.services.base.errors import PreflightError, UserError
from sdft.services.cli.main import main
from sdft.services.config.load import load_config
from sdft.services.evaluation.lm_eval import Score, _reason, run_harness, scores
from tests.fakes.chat import change
from tests.fakes.tiny import TOKENS
from tests.runs.run import write_run

CHOICES = ["blue", "green", "white", "red"]
QUESTIONS = [f"The colour of {thing} is" for thing in ("the sky", "grass", "snow", "blood", "the sea", "a leaf")]


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    """A configuration, with the task `colours` beside it.

    The answers to its first four questions are the choices that the tiny model finds likeliest. Those to the last two
    are others.
    """
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def likeliest(question: str) -> int:
        found = []
        for choice in CHOICES:
            start, ids = len(tokenizer.encode(question)), torch.tensor(tokenizer.encode(f"{question} {choice}"))
            with torch.no_grad():
                rows = torch.log_softmax(model(ids[None]).logits[0, start - 1 : -1, :TOKENS], -1)
            found.append(float(rows.gather(1, ids[start:, None]).sum()))
        return found.index(max(found))

    best = [likeliest(question) for question in QUESTIONS]
    answers = [*best[:4], *((b + 1) % 4 for b in best[4:])]
    rows = [{"question": q, "choices": CHOICES, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "colours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "colours.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "colours.yaml").write_text(yaml.safe_dump(task))
    return write_run(tmp_path, tiny_model, "float32")


@pytest.mark.whole
def test_a_task_is_scored_as_the_model_scores_it(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks, out = config.parent / "tasks", config.parent / "out.json"
    words = ["eval", str(config), "--harness", "colours", "--harness-tasks", str(tasks), "--out", str(out)]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("colours                 acc             0.6667 ± ")
    assert lines[0].endswith("n 6")
    assert json.loads(out.read_text())["results"]["colours"]["acc,none"] == pytest.approx(4 / 6)


def test_penalties_of_the_model_folder_do_not_reach_greedy_decoding(
    config: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], *_: object) -> None:
        commands.append(command)
        (Path(command[command.index("--output_path") + 1]) / "results_1.json").write_text("{}")

    monkeypatch.setattr("sdft.services.evaluation.lm_eval._run", run)
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    settings = load_config(config)
    run_harness(settings, folder, "colours", None, None)
    change(folder / "generation_config.json", repetition_penalty=1.3, no_repeat_ngram_size=2, top_k=5, num_beams=1)
    run_harness(settings, folder, "colours", None, None)
    assert "--gen_kwargs" not in commands[0]
    given = commands[1][commands[1].index("--gen_kwargs") + 1]
    assert given == "repetition_penalty=1.0,no_repeat_ngram_size=0"


def test_results_that_cannot_be_written_cost_no_scores(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config.parent / ".out.json.part").mkdir()  # as a disk that is full in the end
    results = b'{"results": {"colours": {"acc,none": 0.5}}}'
    monkeypatch.setattr("sdft.services.evaluation.lm_eval.run_harness", lambda *_: results)
    assert main(["eval", str(config), "--harness", "colours", "--out", str(config.parent / "out.json")]) == 3
    said = capsys.readouterr()
    assert said.out == "colours                 acc             0.5000  n 0\n"
    assert "out.json: the results could not be written ([Errno 21]" in said.err


# Last lines of lm-eval 0.4.13's output.
UNKNOWN = "ValueError: Tasks not found: ['colourz']"
OFFLINE = "ConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled)"


@pytest.mark.parametrize(
    ("line", "kind", "expected"),
    [
        (UNKNOWN, UserError, "--harness t: lm-eval has no such task (ValueError: Tasks not found: ['colourz'])"),
        (OFFLINE, PreflightError, "lm-eval downloads a task's data at its first use, and the hub cannot be reached"),
        ("MemoryError", RuntimeError, "lm-eval could not run t: MemoryError"),
    ],
)
def test_the_reason_of_a_failed_harness_is_reported(line: str, kind: type[Exception], expected: str) -> None:
    error = _reason("t", ["Traceback (most recent call last):\n", f"{line}\n", "\n"])
    assert type(error) is kind
    assert expected in str(error)


def test_a_missing_folder_of_tasks_is_an_error(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(config), "--harness", "colours", "--harness-tasks", "nowhere"]) == 2
    assert "--harness-tasks nowhere: no such folder; give the folder with your task files" in capsys.readouterr().err


def test_every_metric_of_every_task_is_a_line() -> None:
    given = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.1, "norm,none": 0.6, "norm_stderr,none": "N/A"},
            "b": {"word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
            "group": {"alias": "group", "name": "group", "sample_len": 35, "acc,none": 0.4, "acc_stderr,none": 0.1},
        },
        "n-samples": {"a": {"original": 40, "effective": 20}},
    }  # fmt: skip
    first, second, third, of_group = scores(given)
    assert of_group == Score("group", "acc", 0.4, 0.1, 35)
    assert first == Score("a", "acc", 0.5, 0.1, 20)
    assert (second.metric, third.metric, third.value) == ("norm", "word_perplexity", 12.5)
    assert math.isnan(second.stderr)
    assert str(first).endswith("0.5000 ± 0.1960  n 20")
