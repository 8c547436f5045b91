"""Whole commands with bad input: the message, the exit code, and that nothing was started or left behind."""

from collections.abc import Callable
from pathlib import Path

import pytest

from sdft.services.cli.main import main
from tests.fakes.spoiling import (
    QUESTION,
    ROW,
    Work,
    as_run,
    big,
    chat_template,
    damaged_checkpoint,
    file,
    in_use,
    larger_tokenizer,
    link,
    nothing,
    other_model,
    rows,
    run_folder,
    setting,
    two,
)
from tests.fakes.tiny import TEMPLATE
from tests.runs.leftovers import children, new_since

TRAIN = "train my.yaml"
NO_CLUSTER = setting("ray.address", "127.0.0.1:1")  # also set so that a case whose error is missed starts no run
LONG = "one two three four five " * 40
# name: (what is spoiled, the command, the exit code, words of the message)
CASES: dict[str, tuple[Callable[[Work], None], str, int, list[str]]] = {
    "no such config": (nothing, "train mi.yaml", 2, ["mi.yaml: no such file", "my.yaml"]),
    "config is a folder": (lambda w: (w.folder / "d").mkdir(), "train d", 2, ["d: this is a folder"]),
    "empty config": (file("my.yaml", ""), TRAIN, 2, ["my.yaml: the file is empty"]),
    "not yaml": (file("my.yaml", "model: [a\ndata: b\n"), TRAIN, 2, ["my.yaml:"]),
    "not a mapping": (file("my.yaml", "- a\n- b\n"), TRAIN, 2, ["my.yaml", "mapping"]),
    "not utf-8": (file("my.yaml", b"model: \xff\n"), TRAIN, 2, ["my.yaml:1", "UTF-8"]),
    "a key twice": (file("my.yaml", "model: a\nmodel: b\n"), TRAIN, 2, ["my.yaml:2", "model"]),
    "unknown key": (setting("training.batch_sise", 4), TRAIN, 2, ["training.batch_sise", "training.batch_size?"]),
    "wrong type": (setting("training.steps", "ten"), TRAIN, 2, ["training.steps must be a whole number", '"ten"']),
    "out of range": (setting("teacher.alpha", 1.5), TRAIN, 2, ["teacher.alpha must be at most 1", "1.5"]),
    "a setting that was renamed": (
        setting("actors.teacher.enforce_eager", False),
        TRAIN,
        2,
        ["actors.teacher.enforce_eager is not a setting any more", "set execution: eager in place of true"],
    ),
    "graphs without a GPU": (
        setting("actors.student.execution", "graphs"),
        TRAIN,
        2,
        ["actors.student.execution graphs means CUDA graphs, and device is cpu", "eager or compiled"],
    ),
    "unknown choice": (
        setting("method.divergence", "foward"),
        TRAIN,
        2,
        ["method.divergence", "did you mean forward?"],
    ),
    "hindsight that no template shows": (
        setting("method", "hindsight"),
        TRAIN,
        2,
        ["data.template: turn does not show", "set data.template or data.fallback_template to feedback"],
    ),
    "no data": (setting("data.train", None), TRAIN, 2, ["data.train is required"]),
    "two lengths": (setting("training.epochs", 1), TRAIN, 2, ["training", "exactly one of epochs and steps"]),
    "no length": (setting("training.steps", None), TRAIN, 2, ["training", "exactly one of epochs and steps"]),
    "limits that contradict": (
        setting("data.max_teacher_prompt_tokens", 50),
        TRAIN,
        2,
        ["at least max_prompt_tokens"],
    ),
    "no masters": (setting("learner.zero_stage", 0), TRAIN, 2, ["learner.zero_stage 0", "set it to 1"]),
    "adapters on nothing": (
        setting("learner.lora", {"targets": ["qproj"]}),
        TRAIN,
        2,
        ["learner.lora.targets: qproj is not a linear layer", "q_proj"],
    ),
    "adapters on the head": (
        setting("learner.lora", {"targets": ["q_proj", "lm_head"]}),
        TRAIN,
        2,
        ["learner.lora.targets: lm_head is not a linear layer", "that can be adapted"],
    ),
    "no such transport": (
        setting("weights.transport", "no_such:Thing"),
        TRAIN,
        2,
        ["my.yaml: weights.transport: no_such:Thing cannot be imported (ModuleNotFoundError: No module"],
    ),
    "more ranks than rollouts": (setting("learner.ranks", 3), TRAIN, 2, ["learner.ranks 3 must not exceed"]),
    "override without =": (nothing, f"{TRAIN} --set seed", 2, ["--set seed", "no ="]),
    "override of nothing": (nothing, f"{TRAIN} --set sead=1", 2, ["--set sead=1", "did you mean seed?"]),
    "no data file": (setting("data.train", "trian.jsonl"), TRAIN, 2, ["data.train", "did you mean train.jsonl?"]),
    "data of another kind": (
        two(setting("data.train", "a.csv"), file("a.csv", "a,b\n")),
        TRAIN,
        2,
        ["data.train", "a.csv must be a .jsonl or .parquet file"],
    ),
    "empty data file": (file("train.jsonl", ""), TRAIN, 2, ["train.jsonl: there are no rows"]),
    "truncated json": (rows("train.jsonl", ROW, b'{"prompt": "x", "dem'), TRAIN, 2, ["train.jsonl:2", "too early"]),
    "deep json": (rows("train.jsonl", b"[" * 100_000), TRAIN, 2, ["train.jsonl:1", "not valid JSON"]),
    "not utf-8 data": (rows("train.jsonl", ROW, b'{"prompt": "\xff"}'), TRAIN, 2, ["train.jsonl:2", "UTF-8"]),
    "equal ids": (rows("train.jsonl", ROW | {"id": 1}, ROW | {"id": 1}), TRAIN, 2, ["train.jsonl:2", 'id "1"', "1"]),
    "empty demonstration": (rows("train.jsonl", ROW | {"demonstration": " "}), TRAIN, 2, ["demonstration is empty"]),
    "null prompt": (rows("train.jsonl", ROW | {"prompt": None}), TRAIN, 2, ["train.jsonl:1: prompt is null"]),
    "prompt of a wrong type": (rows("train.jsonl", ROW | {"prompt": 3}), TRAIN, 2, ["prompt must be text or a list"]),
    "a mistyped field": (rows("train.jsonl", ROW | {"contexts": "x"}), TRAIN, 2, ["contexts", "did you mean context?"]),
    "a field twice": (rows("train.jsonl", b'{"prompt": "a", "prompt": "b"}'), TRAIN, 2, ["prompt", "twice"]),
    "unreadable parquet": (
        two(setting("data.train", "a.parquet"), file("a.parquet", "no")),
        TRAIN,
        2,
        ["a.parquet: not a readable Parquet file"],
    ),
    "no such hub data": (setting("data.train", "nobody/nothing"), TRAIN, 2, ["data.train: nobody/nothing"]),
    "long prompt": (rows("train.jsonl", ROW, ROW | {"prompt": LONG}), TRAIN, 2, ["train.jsonl:2", "max_prompt_tokens"]),
    "long teacher prompt": (
        rows("train.jsonl", ROW | {"demonstration": LONG}),
        TRAIN,
        2,
        ["train.jsonl:1", "max_teacher_prompt_tokens"],
    ),
    "no such template": (setting("data.template", "my.jinja"), TRAIN, 2, ["data.template", "my.jinja"]),
    "broken template": (
        two(setting("data.template", "my.jinja"), file("my.jinja", "{{ demonstration")),
        TRAIN,
        2,
        ["my.jinja:1: not a valid Jinja template"],
    ),
    "template of an unknown name": (
        two(setting("data.template", "my.jinja"), file("my.jinja", "{{ demonstration }} {{ shema }}")),
        TRAIN,
        2,
        ["my.jinja:1", "shema"],
    ),
    "a chat template that shows the last message alone": (
        chat_template(f"{{% set messages = messages[-1:] %}}{TEMPLATE}"),
        TRAIN,
        2,
        ["train.jsonl:1: the chat template", "does not show the whole demonstration", "set data.template: paper"],
    ),
    "a chat template that opens no reply": (
        chat_template(TEMPLATE.replace("add_generation_prompt", "false")),
        TRAIN,
        2,
        ["model: the chat template", "ignores add_generation_prompt"],
    ),
    "a chat template that adds text and numbers": (
        chat_template("{{ 'a' + 1 }}"),
        TRAIN,
        2,
        ["train.jsonl:1: the chat template", "can only concatenate str", "change the messages or the template"],
    ),
    "more tokens scored than there are": (
        setting("method.divergence", {"type": "forward", "top_k": 353}),
        TRAIN,
        2,
        ["method.divergence.top_k is 353, and the tokenizer has 352 tokens; lower it"],
    ),
    "more tokens of student and teacher than there are": (
        setting("method.divergence", {"type": "forward", "support": "union", "top_k": 177}),
        TRAIN,
        2,
        ["top_k is 177, and support union has twice as many of each position", "352 tokens; lower it to at most 176"],
    ),
    "a tokenizer of another model": (
        larger_tokenizer,
        TRAIN,
        2,
        ["the token <199> with id 551", "tokens 0 to 511 only", "put the tokenizer"],
    ),
    "functions beside a prompt": (
        rows("train.jsonl", ROW | {"functions": [{"name": "f"}]}),
        TRAIN,
        2,
        ["train.jsonl:1: functions is not used", "write it into the prompt"],
    ),
    "tools for a chat template without tools": (
        rows("train.jsonl", ROW, ROW | {"tools": [{"name": "look"}]}),
        TRAIN,
        2,
        ["train.jsonl:2: the chat template", "leaves out the tool look of the column tools", "remove the column"],
    ),
    "an image in a question": (
        rows("eval.jsonl", QUESTION | {"prompt": [{"type": "image_url", "image_url": "a.png"}]}),
        TRAIN,
        2,
        ["eval.jsonl:1: prompt part 1 is of type image_url", "data is text only today"],
    ),
    "a turn of nobody": (
        two(
            setting("data.format", "sharegpt"),
            rows("train.jsonl", {"conversations": [{"from": "bot", "value": "x"}]}),
        ),
        TRAIN,
        2,
        ["train.jsonl:1: conversations turn 1: from must be one of system, human, user, gpt", "not 'bot'"],
    ),
    "alpaca without its format": (
        rows("train.jsonl", {"instruction": "x", "output": "y"}),
        TRAIN,
        2,
        ["train.jsonl:1: prompt is missing (the row has instruction, output); set data.format: alpaca"],
    ),
    "no row to show": (nothing, "check my.yaml --show 0", 2, ["--show"]),
    "no such model": (setting("model", "smollm2-153m"), TRAIN, 2, ["smollm2-153m", "did you mean smollm2-135m?"]),
    "half a model": (
        two(setting("model", "m"), file("m/config.json", "{}")),
        TRAIN,
        2,
        ["m lacks tokenizer_config.json, *.safetensors"],
    ),
    "a model of another kind": (
        lambda w: w.set("model", str(other_model(w))),
        TRAIN,
        2,
        ["cannot be trained here: its rope_type is dynamic", "choose another"],
    ),
    "a model too short": (setting("data.max_teacher_prompt_tokens", 5000), TRAIN, 2, ["4096 positions"]),
    "no evaluation file": (
        setting("evaluation.sets", [{"name": "a", "file": "evl.jsonl", "grader": "exact"}]),
        TRAIN,
        2,
        ["evaluation.sets[0].file", "did you mean eval.jsonl?"],
    ),
    "two sets of one name": (
        setting("evaluation.sets", [{"name": "a", "file": "eval.jsonl", "grader": "exact"}] * 2),
        TRAIN,
        2,
        ["same name"],
    ),
    "no answer": (rows("eval.jsonl", {"prompt": "x"}), TRAIN, 2, ["eval.jsonl:1: answer is missing"]),
    "no text": (
        two(
            setting("evaluation.sets", [{"name": "a", "file": "eval.jsonl", "grader": "perplexity"}]),
            rows("eval.jsonl", QUESTION),
        ),
        TRAIN,
        2,
        ["eval.jsonl:1: text is missing"],
    ),
    "a text that is too long": (
        two(
            setting("evaluation.sets", [{"name": "a", "file": "eval.jsonl", "grader": "perplexity"}]),
            rows("eval.jsonl", {"text": "word " * 5000}),
        ),
        TRAIN,
        2,
        ["eval.jsonl:1: the text has", "data.max_teacher_prompt_tokens", "split the text"],
    ),
    "pass@k of texts": (
        setting("evaluation.sets", [{"name": "a", "file": "eval.jsonl", "grader": "perplexity", "pass_at": [1]}]),
        TRAIN,
        2,
        ["pass_at needs replies", "remove pass_at"],
    ),
    "an answer that is no number": (rows("eval.jsonl", b'{"prompt": "x", "answer": NaN}'), TRAIN, 2, ["NaN"]),
    "an answer that the grader cannot use": (
        two(
            setting("evaluation.sets", [{"name": "a", "file": "eval.jsonl", "grader": "tool_call"}]),
            rows("eval.jsonl", QUESTION),
        ),
        TRAIN,
        2,
        ["eval.jsonl:1", "answer"],
    ),
    "no mlflow": (setting("monitoring.mlflow_experiment", "x"), TRAIN, 2, ["monitoring.mlflow_experiment", "install"]),
    "another run's folder": (run_folder, TRAIN, 2, ["belongs to a run with another configuration"]),
    "a run there already": (run_folder, f"{TRAIN} --resume never", 2, ["holds a run already", "--resume auto"]),
    "a run in progress": (
        two(in_use, NO_CLUSTER),
        TRAIN,
        2,
        ["runs/my: another process is training in this folder", "--run-dir"],
    ),
    "a run's folder that takes no files": (
        two(file("runs/my/.lock/file", ""), NO_CLUSTER),
        TRAIN,
        2,
        ["runs/my: no file can be written there ([Errno 21] Is a directory"],
    ),
    "too little disk": (
        two(setting("checkpoint.keep", 10**9), file("runs/my/empty", ""), NO_CLUSTER),
        TRAIN,
        3,
        ["runs/my: 1000000001 checkpoints take up to", "GB are free there"],
    ),
    "a damaged checkpoint": (
        damaged_checkpoint,
        f"{TRAIN} --resume runs/my/checkpoints/step-000002",
        2,
        ["cannot be used: state.json is not as it was written"],
    ),
    "all checkpoints are damaged": (
        two(damaged_checkpoint, NO_CLUSTER),
        TRAIN,
        2,
        ["step-000002 is damaged (state.json is not as it was written)", "--resume PATH", "another --run-dir"],
    ),
    "checkpoints of a run without metrics": (
        two(run_folder, lambda w: (w.folder / "runs/my/metrics.jsonl").unlink(), NO_CLUSTER),
        f"{TRAIN} --resume never",
        2,
        ["runs/my holds a run already"],
    ),
    "export of damaged checkpoints": (
        damaged_checkpoint,
        "export runs/my --out o",
        2,
        ["step-000002 is damaged (state.json is not as it was written)"],
    ),
    "export below a file": (
        two(run_folder, file("f", "")),
        "export runs/my --out f/o",
        2,
        ["--out f/o: nothing can be written there (Not a directory)"],
    ),
    # Before the checkpoint, of which every file is read.
    "export to where nothing can be written": (
        damaged_checkpoint,
        "export runs/my --out /proc/o",
        2,
        ["--out /proc/o: nothing can be written there"],
    ),
    "a model where nothing can be written": (
        nothing,
        "model smollm2-135m --out /proc/o",
        2,
        ["--out /proc/o: the model cannot be written there"],
    ),
    "answers where nothing can be written": (
        nothing,
        "eval my.yaml --out /proc/a.jsonl",
        2,
        ["--out /proc/a.jsonl: nothing can be written there"],
    ),
    "answers in place of a device": (nothing, "eval my.yaml --out /dev/null", 2, ["--out /dev/null: this is a device"]),
    "answers of a name too long": (
        nothing,
        f"eval my.yaml --out {'a' * 256}",
        2,
        [f"--out {'a' * 256}: no file can be there (File name too long)"],
    ),
    "benchmarks' results where nothing can be written": (
        nothing,
        "eval my.yaml --harness colours --out /proc/o.json",
        2,
        ["--out /proc/o.json: nothing can be written there"],
    ),
    "a report that cannot be written": (
        two(run_folder, lambda w: (w.folder / "runs/my/report.html").mkdir()),
        "report runs/my",
        3,
        ["runs/my: the report could not be written ([Errno 21]"],
    ),
    "no checkpoint to resume": (nothing, f"{TRAIN} --resume nowhere", 2, ["--resume nowhere"]),
    "a job's own folder": (
        nothing,
        f"{TRAIN} --run-dir _ray_pkg_1/runs/my",
        2,
        ["copy of the working directory", "absolute path"],
    ),
    "too little memory": (setting("actors.student.kv_cache_gib", 9000), TRAIN, 3, ["GiB are free here", "kv_cache"]),
    "too little GPU memory": (
        two(setting("device", "cuda"), setting("ray.gpu_memory_gib", 0.5)),
        "check my.yaml",
        3,
        ["student engine 0 need 1.2 GiB, and a GPU has 0.5 GiB", "use a smaller model"],
    ),
    "too little of a GPU for an engine": (
        two(
            two(setting("device", "cuda"), setting("ray.gpu_memory_gib", 80)),
            setting("actors.teacher.gpu_memory_utilization", 0.01),
        ),
        TRAIN,
        3,
        ["actors.teacher.gpu_memory_utilization 0.01 is 0.8 of a GPU's 80.0 GiB", "set it to 0.02"],
    ),
    "too little cache": (
        setting("actors.teacher.kv_cache_gib", 1e-5),
        TRAIN,
        2,
        ["actors.teacher.kv_cache_gib is 1e-05"],
    ),
    "an unknown engine": (setting("actors.student.engine", "vlm"), TRAIN, 2, ["engine vlm is not known", "vllm"]),
    "an engine that is not there": (
        setting("actors.teacher.engine", "my_engines:Mine"),
        TRAIN,
        2,
        ["actors.teacher.engine: my_engines:Mine cannot be imported", "PYTHONPATH"],
    ),
    "a mistyped pool": (setting("actors.studnet", {"replicas": 2}), TRAIN, 2, ["studnet has no role", "mean student?"]),
    "a second pool of students": (
        setting("actors.more", {"role": "student"}),
        TRAIN,
        2,
        ["student and more have the same role", "student.replicas"],
    ),
    "a shared GPU without a size": (
        two(setting("device", "cuda"), setting("actors.student.gpus", 0.5)),
        TRAIN,
        2,
        ["actors.student.gpus 0.5", "set actors.student.kv_cache_gib"],
    ),
    "a model that cannot be split": (
        setting("actors.student.tensor_parallel", 2),
        TRAIN,
        2,
        ["actors.student.tensor_parallel is 2", "num_key_value_heads 1", "set it to 1"],
    ),
    "a broadcast to engines that are split": (
        two(setting("actors.teacher.tensor_parallel", 2), setting("weights.transport", "broadcast")),
        TRAIN,
        2,
        ["weights.transport broadcast", "actors.teacher.tensor_parallel is 2", "set weights.transport: memory"],
    ),
    "no cluster there": (NO_CLUSTER, TRAIN, 3, ["no Ray cluster answers at 127.0.0.1:1"]),
    "check reads the data too": (rows("train.jsonl", b"{"), "check my.yaml", 2, ["train.jsonl:1"]),
    "status of no folder": (nothing, "status nowhere", 2, ["nowhere: there is no such folder"]),
    "status of no run": (lambda w: (w.folder / "d").mkdir(), "status d", 2, ["d: no run in this folder"]),
    "report of no run": (lambda w: (w.folder / "d").mkdir(), "report d", 2, ["d: no run in this folder"]),
    "nothing to replay": (run_folder, "replay runs/my", 2, ["recorded no rollouts", "monitoring.record_rollouts"]),
    "replay of no run": (nothing, "replay nowhere", 2, ["nowhere: there is no such folder"]),
    "nothing to export": (lambda w: (w.folder / "d").mkdir(), "export d --out o", 2, ["d has no checkpoint"]),
    "export over something": (
        two(run_folder, file("o/x", "")),
        "export runs/my --out o",
        2,
        ["--out o exists already"],
    ),
    "export of a step that was not saved": (run_folder, "export runs/my --step 7 --out o", 2, ["checkpoint of step 7"]),
    "no such built-in model": (nothing, "model smollm2 --out o", 2, ["smollm2", "did you mean smollm2-135m?"]),
    "a model over something": (file("o/x", ""), "model smollm2-135m --out o", 2, ["--out o"]),
    "a model below a file": (file("o", ""), "model smollm2-135m --out o/m", 2, ["--out o/m"]),
    "nothing to evaluate": (setting("evaluation.sets", []), "eval my.yaml", 2, ["evaluation.sets is empty"]),
    "answers into no folder": (nothing, "eval my.yaml --out no/a.jsonl", 2, ["--out no/a.jsonl"]),
    "eval of no model": (nothing, "eval my.yaml --model nowhere/m", 2, ["nowhere/m"]),
    "submit from elsewhere": (
        nothing,
        "submit /etc/hosts --run-dir /r --address http://127.0.0.1:1",
        2,
        ["/etc/hosts"],
    ),
    "submit into the job": (nothing, "submit my.yaml --run-dir r --address http://127.0.0.1:1", 2, ["absolute path"]),
    "submit of too much": (
        big("big.bin"),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        2,
        ["big.bin (210 MB)"],
    ),
    "submit of too much behind a link": (
        two(big("runs/big.bin"), link("link.bin", "runs/big.bin")),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        2,
        ["link.bin (210 MB)"],
    ),
    "submit of what Ray leaves out": (
        two(
            big("big.bin"),
            file(".gitignore", "/big.bin"),
            file("more/.rayignore", "*.bin"),
            big("more/big.bin"),
        ),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        3,
        ["no Ray cluster takes jobs there"],
    ),
    "submit of what only the cluster has": (
        two(
            setting("data.train", "/of/the/cluster/train.jsonl"),
            setting("data.template", "/of/the/cluster/my.jinja"),
            setting("evaluation.sets", [{"name": "a", "file": "/of/the/cluster/a.jsonl", "grader": "exact"}]),
        ),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        3,
        ["no Ray cluster takes jobs there"],
    ),
    "submit of data of another kind": (
        setting("data.train", "/of/the/cluster/train.csv"),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        2,
        ["/of/the/cluster/train.csv must be a .jsonl or .parquet file"],
    ),
    "submit of what is not in the folder": (
        lambda w: w.set("data.train", str(w.folder / "trian.jsonl")),
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        2,
        ["data.train", "did you mean train.jsonl?"],
    ),
    "submit to nobody": (
        nothing,
        "submit my.yaml --run-dir /r --address http://127.0.0.1:1",
        3,
        ["--address http://127.0.0.1:1: no Ray cluster takes jobs there"],
    ),
    "nothing to append to": (
        file("more.yaml", "{name: b, data: {train: train.jsonl}, steps: 1}"),
        f"{TRAIN} --append more.yaml",
        2,
        ["--append more.yaml: there is no run in", "put the stage into the configuration's stages"],
    ),
    "a stage of nothing": (
        two(
            file("more.yaml", "{name: b, data: {train: train.jsonl}, stepz: 1}"),
            as_run,
        ),
        f"{TRAIN} --append more.yaml",
        2,
        ["sdft: more.yaml: stepz is not a setting; did you mean steps?"],
    ),
    "a file where the run goes": (
        file("r", ""),
        f"{TRAIN} --run-dir r",
        2,
        ["--run-dir r: the folder cannot be created"],
    ),
    "a folder for answers": (nothing, "eval my.yaml --out .", 2, ["--out .: this is a folder; name a file"]),
    "no feedback to show": (
        setting("data.template", "feedback"),
        TRAIN,
        2,
        ["train.jsonl:1: feedback is missing (the row has prompt, demonstration"],
    ),
    "no command": (nothing, "trian my.yaml", 2, ["No such command 'trian'", "Did you mean 'train'?"]),
}


def test_the_cache_size_of_a_pool_without_engines_is_not_checked(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the case "too little cache", but with a live teacher, which has no engines."""
    monkeypatch.chdir(tmp_path)
    work = Work(tmp_path, tiny_model)
    work.set("teacher.weights", "live")
    work.set("actors.teacher.kv_cache_gib", 1e-5)
    work.save()
    assert main(["check", "my.yaml"]) == 0


def test_export_says_that_the_newest_checkpoint_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sdft.services.records import checkpoints

    for step in (1, 2):
        part = checkpoints.begin(tmp_path, step)
        (part / "student").mkdir()
        (part / "student" / "config.json").write_text(str(step))
        checkpoints.commit(part, tmp_path, checkpoints.CheckpointState(step, 1, 1, "float32", "f"), keep=2)
    (tmp_path / "checkpoints/step-000002/student/config.json").write_text("")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    note, done = capsys.readouterr().out.splitlines()
    assert "step-000002 is damaged (student/config.json is not as it was written); using the one before it" in note
    assert done.endswith("the student of step-000001, a plain Hugging Face folder")
    assert (tmp_path / "out" / "config.json").read_text() == "1"


@pytest.mark.parametrize("name", CASES)
def test_bad_input_gets_its_sentence_and_leaves_nothing(
    name: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, command, code, words = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # `sdft submit` sets it for its own process, which in this test is also the process of the other tests.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    work = Work(tmp_path, tiny_model)
    spoil(work)
    work.save()
    files, processes = set(tmp_path.rglob("*")), children()
    try:
        given = main(command.split())
    except SystemExit as e:  # argparse raises it
        given = int(str(e.code))
    stderr = capsys.readouterr().err
    assert given == code, stderr
    for word in words:
        assert word in stderr
    assert "Traceback" not in stderr
    new = {p for p in tmp_path.rglob("*") if p not in files}
    # A run without its resources keeps its folder, with the reason. A run directory that existed gets a lock.
    assert {p for p in new if name != "no cluster there" and p.name != ".lock"} == set()
    assert new_since(processes, children) == set()
