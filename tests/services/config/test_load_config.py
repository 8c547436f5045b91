"""The configuration: what loads, and the one sentence for every mistake."""

import os
from pathlib import Path

import pytest
import torch

from sdft.actors.roles import ROLES
from sdft.services.base.errors import UserError
from sdft.services.cli import summary
from sdft.services.cli.summary import dtype_lines
from sdft.services.config import dtype
from sdft.services.config.dtype import has_bfloat16
from sdft.services.config.load import load_config, resolved_yaml
from sdft.services.config.paths import with_absolute_paths
from sdft.services.config.run import RunConfig
from sdft.services.data.check_files import check_files

GOOD = "model: m\ndata: {train: train.jsonl}\ntraining: {epochs: 1}\n"


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def message(folder: Path, text: str, *overrides: str) -> str:
    """Return the error for a configuration, without the folder's name."""
    with pytest.raises(UserError) as e:
        load(folder, text, *overrides)
    assert "\n" not in str(e.value)
    assert "Value error" not in str(e.value)
    return str(e.value).replace(f"{folder}{os.sep}", "")


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.training.epochs == 1
    assert config.method.type == "sdft"


def test_a_pool_has_the_role_of_its_name_unless_it_says_another(tmp_path: Path) -> None:
    actors = load(tmp_path, GOOD + "actors: {teacher: {replicas: 2}, held_out: {role: evaluation, replicas: 3}}").actors
    assert {name: (actors.role_name(name), pool.replicas) for name, pool in actors.pools.items()} == {
        "student": ("student", 1),
        "teacher": ("teacher", 2),
        "held_out": ("evaluation", 3),
    }
    assert load(tmp_path, GOOD + "actors: {evaluation: {}}").actors.role_name("evaluation") == "evaluation"
    assert load(tmp_path, GOOD, "actors.held_out.role=evaluation").actors.role("held_out") == ROLES["evaluation"]
    with pytest.raises(KeyError, match="students"):
        actors.role("students")


def test_an_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    for text in ("1e-5", "1E-5", "1.e-5", "1.0e-5", "0.00001"):
        assert load(tmp_path, GOOD + f"learner: {{optimizer: {{lr: {text}}}}}").learner.optimizer.lr == 1e-5


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        GOOD,
        "training.epochs=null",
        "training.steps=7",
        "learner.optimizer.lr=3e-5",
        "evaluation.sets=[{name: a, file: a.jsonl, grader: exact}]",
        "data.system=a = b",
    )
    assert (config.training.epochs, config.training.steps) == (None, 7)
    assert config.learner.optimizer.lr == 3e-5
    assert config.evaluation.sets[0].name == "a"
    assert config.data is not None
    assert config.data.system == "a = b"


def test_the_resolved_config_loads_to_an_equal_one(tmp_path: Path) -> None:
    # Text that YAML could parse as a number, a date, a boolean or null must be read back as text.
    for name in ("1e-5", "2026-01-01", "yes", "null", "12", "ä: #", "0x10", "1:30"):
        config = load(tmp_path, GOOD, f"data.system='{name}'", "learner.optimizer.lr=1e-5")
        assert config.data is not None
        assert config.data.system == name
        assert load(tmp_path, resolved_yaml(config)) == config


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("trainer: 1", "my.yaml: trainer is not a setting; did you mean training?"),
        ("lr: 1.0", "my.yaml: lr is not a setting; did you mean learner.optimizer.lr?"),
        (
            "evaluation: {timeout_s: 60}",
            "my.yaml: evaluation.timeout_s is not a setting any more; set actors.batch_timeout_s for rollouts, scores "
            "and replies, and evaluation.grading_timeout_s for a judge and lm-eval",
        ),
        ("method: {skip_frst: 3}", "my.yaml: method.skip_frst is not a setting; did you mean method.skip_first?"),
        ("ray: {zzz: 3}", "my.yaml: ray.zzz is not a setting; ray has address, wait_s, autoscaling, gpu_memory_gib"),
        ("seed: yes", "my.yaml: seed must be a whole number, not true"),
        ("seed: 1.5", "my.yaml: seed must be a whole number, not 1.5"),
        ("seed: '3'", 'my.yaml: seed must be a whole number, not the text "3"'),
        ("seed: -1", "my.yaml: seed must be at least 0, not -1"),
        ("learner: {optimizer: {lr: yes}}", "my.yaml: learner.optimizer.lr must be a number, not true"),
        ("learner: {optimizer: {lr: fast}}", 'my.yaml: learner.optimizer.lr must be a number, not the text "fast"'),
        ("learner: {optimizer: {lr: .inf}}", "my.yaml: learner.optimizer.lr must be a finite number, not inf"),
        (
            "weights: {sync_every: 3}",
            "my.yaml: weights.sync_every 3 lets rollouts be 2 steps behind; set training.max_staleness to 2, or "
            "weights.sync_every to 1",
        ),
        (
            "weights: {transport: memroy}",
            "my.yaml: weights.transport: memroy is not memory, changes, broadcast, ipc or the import path of your own, "
            "package.module:Name; did you mean memory?",
        ),
        (
            "weights: {transport: ipc}",
            "my.yaml: weights.transport ipc passes memory of the learner's GPU, and device is cpu; set it to memory or "
            "broadcast, or set device: cuda",
        ),
        (
            "device: cuda\nweights: {transport: ipc}\nactors: {teacher: {engine: 'mine:Engine'}}",
            "my.yaml: weights.transport ipc works with vLLM's engines only, and actors.teacher.engine is a class of "
            "your own; set it to memory, or remove engine",
        ),
        (
            "weights: {transport: 'json:JSONDecoder'}",
            "my.yaml: weights.transport: json:JSONDecoder is not a subclass of "
            "sdft.actors.transport.protocol.WeightTransport; derive it from that class",
        ),
        ("learner: {lora: {rank: 0}}", "my.yaml: learner.lora.rank must be at least 1, not 0"),
        ("learner: {lora: {r: 8}}", "my.yaml: learner.lora.r is not a setting; learner.lora has rank, alpha, targets"),
        ("learner: {lora: 16}", "my.yaml: learner.lora must be a mapping of settings, not 16"),
        ("targets: [q_proj]", "my.yaml: targets is not a setting; did you mean learner.lora.targets?"),
        ("learner: {zero_stage: yes}", "my.yaml: learner.zero_stage must be 0 or 1 or 2 or 3, not true"),
        ("learner: {zero_stage: 5}", "my.yaml: learner.zero_stage must be 0 or 1 or 2 or 3, not 5"),
        (
            "evaluation: {sets: [{name: a, file: f, grader: exact, columns: {answr: x}}]}",
            "my.yaml: evaluation.sets[0].columns.answr is not a column; did you mean "
            "evaluation.sets[0].columns.answer?",
        ),
        (
            "evaluation: {sets: [{name: a, file: f, grader: exact, columns: {zzz: x}}]}",
            "my.yaml: evaluation.sets[0].columns.zzz is not a column; the columns are prompt, demonstration, id, "
            "context, feedback, answer, text, tools, teacher",
        ),
        ("monitoring: {tensorboard: 1}", "my.yaml: monitoring.tensorboard must be true or false, not 1"),
        ("run_dir: 5", "my.yaml: run_dir must be text, not 5; put it in quotes"),
        (
            "method: {divergence: foward}",
            'my.yaml: method.divergence must be forward or reverse or jsd or sampled, not the text "foward"; did you '
            "mean forward?",
        ),
        ("weights:", "my.yaml: weights must be a mapping of settings, not empty; give its settings or remove the key"),
        ("evaluation: {sets: {a: 1}}", "my.yaml: evaluation.sets must be a list, not a mapping"),
        (
            "evaluation: {sets: [{name: a, file: f}]}",
            "my.yaml: evaluation.sets[0].grader is required but missing; it is: the rule that decides "
            "whether a reply is right; environment: each question is an episode, and the environment says whether it "
            "has passed; perplexity scores texts instead",
        ),
        (
            "evaluation: {sets: [{name: a, file: f, grader: exact, rle: task}]}",
            "my.yaml: evaluation.sets[0].rle is not a setting; did you mean evaluation.sets[0].role?",
        ),
        ("learner: {optimizer: {betas: [0.9]}}", "my.yaml: learner.optimizer.betas[1] is missing from the list"),
        ("seed: -1\nray: {wait_s: 0}", "my.yaml: seed must be at least 0, not -1 (and 1 more)"),
        (
            "weights: {teacher_sync_every: 10}\nevaluation: {every: 5, sets: [{name: a, file: f, grader: exact}]}\n"
            "retention: {max_drop: 0.1, sets: [a], action: stop}",
            "my.yaml: evaluation.every 5 must be a multiple of weights.teacher_sync_every 10, or a run resumed from a "
            "checkpoint has a newer teacher than an uninterrupted run",
        ),
        (
            "weights: {teacher_sync_every: 20}",
            "my.yaml: checkpoint.every 50 must be a multiple of weights.teacher_sync_every 20, or a run resumed from a "
            "checkpoint has a newer teacher than an uninterrupted run",
        ),
        (
            "actors: {teacher: {max_replicas: 3}}",
            "my.yaml: actors.teacher.max_replicas lets the number of engines change, which would change the bits of a "
            "strict run; set training.max_staleness to 1 or more, or remove max_replicas",
        ),
        (
            "actors: {student: {replicas: 4, max_replicas: 3}}",
            "my.yaml: actors.student: max_replicas 3 is less than replicas 4, which is the pool's least; raise it, or "
            "leave it out for a pool of one size",
        ),
        (
            "actors: {studnet: {}}",
            "my.yaml: actors: studnet has no role; did you mean student? A further pool needs role: evaluation",
        ),
        ("actors: {held_out: {}}", "my.yaml: actors: held_out has no role; a further pool needs role: evaluation"),
        (
            "actors: {batch_timeout: 9}",
            "my.yaml: actors.batch_timeout is not a setting; did you mean actors.batch_timeout_s?",
        ),
        (
            "actors: {replicas: 2}",
            "my.yaml: actors.replicas is not a setting; did you mean actors.student.replicas or "
            "actors.teacher.replicas?",
        ),
        (
            "actors: {held_out: {role: evaluation, cpu: 1}}",
            "my.yaml: actors.held_out.cpu is not a setting; did you mean actors.held_out.cpus?",
        ),
        ("actors: {held_out: {role: evaluation, cpus: 0}}", "my.yaml: actors.held_out.cpus must be more than 0, not 0"),
        (
            "actors: {held_out: {role: evaluaton}}",
            'my.yaml: actors.held_out.role must be student or teacher or evaluation, not the text "evaluaton"; did you '
            "mean evaluation?",
        ),
        (
            "actors: {more: {role: teacher}}",
            "my.yaml: actors: teacher and more have the same role, teacher, and a run has one pool of each; remove "
            "more, or raise teacher.replicas",
        ),
        (
            "actors: {student: {role: evaluation}}",
            "my.yaml: actors: student.role must be student, not evaluation; remove it, or use another name for the "
            "pool",
        ),
        (
            "actors: {learner: {role: evaluation}}",
            "my.yaml: actors: learner is not a name for a pool, because it names the learner; choose another",
        ),
        (
            "actors: {Held out: {role: evaluation}}",
            "my.yaml: actors: Held out is not a name for a pool; use lower-case letters, digits, - and _",
        ),
        (
            "actors: {evaluation: {max_replicas: 3}}",
            "my.yaml: actors: evaluation.max_replicas lets a pool grow while the learner waits for its samples, and "
            "evaluation engines make none; set evaluation.replicas alone",
        ),
        (
            "actors: {student: {engine: vlm}}",
            "my.yaml: actors.student: engine vlm is not known; set it to vllm, or to a class of your own as "
            "package.module:Name",
        ),
        (
            "learner: {ranks: 64}",
            "my.yaml: learner.ranks 64 must not exceed the 32 rollouts of a step (training.batch_size times "
            "sampling.generations), or some ranks have no work",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_mend(tmp_path: Path, extra: str, expected: str) -> None:
    assert message(tmp_path, GOOD + extra) == expected


def test_a_mistyped_column_or_method_of_a_stage_is_named_with_its_mend(tmp_path: Path) -> None:
    rest = "model: m\ntraining: {batch_size: 4}\nstages: "
    assert message(tmp_path, rest + "[{name: a, steps: 1, data: {train: t.jsonl}, method: stf}]") == (
        "my.yaml: stages[0].method must be sdft or off_policy or sft or dft or recall or sdpo or hindsight or mix, "
        'or a class of your own as package.module:Name, not the text "stf"; did you mean sft?'
    )
    assert message(tmp_path, rest + "[{name: a, steps: 1, data: {train: t.jsonl, columns: {promt: x}}}]") == (
        "my.yaml: stages[0].data.columns.promt is not a column; did you mean stages[0].data.columns.prompt?"
    )
    assert message(tmp_path, GOOD, "data.columns.promt=x") == (
        "--set data.columns.promt=x: data.columns.promt is not a column; did you mean data.columns.prompt?"
    )


def test_a_mistyped_section_is_not_also_reported_as_missing(tmp_path: Path) -> None:
    text = "model: m\ndata: {train: t.jsonl}\ntrainig: {epochs: 1}"
    assert message(tmp_path, text) == "my.yaml: trainig is not a setting; did you mean training?"


def test_a_missing_setting_is_described(tmp_path: Path) -> None:
    assert message(tmp_path, "model: m\ndata: {}\ntraining: {epochs: 1}").startswith(
        "my.yaml: data.train is required but missing; it is: a .jsonl or .parquet file"
    )


def test_contradicting_settings_say_why(tmp_path: Path) -> None:
    both = "model: m\ndata: {train: t}\ntraining: {epochs: 1, steps: 2}"
    assert message(tmp_path, both) == "my.yaml: training: give exactly one of epochs and steps"
    by_override = message(tmp_path, GOOD, "training.steps=3")
    assert by_override.startswith("--set training.steps=3: training: give exactly one of epochs and steps")
    assert "--set KEY=null" in by_override


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "training.batch_size",
            "--set training.batch_size: there is no =; write it as --set training.batch_size=VALUE",
        ),
        ("=3", "--set =3: the key before = is not complete; write it as --set section.key=VALUE"),
        ("a..b=3", "--set a..b=3: the key before = is not complete; write it as --set section.key=VALUE"),
        (
            "training.batchsize=8",
            "--set training.batchsize=8: training.batchsize is not a setting; did you mean training.batch_size?",
        ),
        ("trainin.steps=8", "--set trainin.steps=8: trainin is not a setting; did you mean training?"),
        ("model.name=8", "--set model.name=8: model is not a mapping; write --set model=VALUE"),
        ("seed=many", '--set seed=many: seed must be a whole number, not the text "many"'),
    ],
)
def test_a_wrong_override_is_named_as_such(tmp_path: Path, override: str, expected: str) -> None:
    assert message(tmp_path, GOOD, override) == expected


STAGES = """model: m
training: {}
stages:
  - {name: tools, data: {train: tools.jsonl}, steps: 40}
  - {name: facts, data: {train: facts.jsonl}, steps: 80}
"""


def test_an_item_of_a_list_is_set_by_its_name(tmp_path: Path) -> None:
    config = load(tmp_path, STAGES, "stages.facts.steps=20", "stages.tools.optimizer.lr=1e-4")
    assert [(s.name, s.steps) for s in config.stages] == [("tools", 40), ("facts", 20)]
    assert [s.optimizer and s.optimizer.lr for s in config.stages] == [1e-4, None]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.tool.steps=2", "--set stages.tool.steps=2: stages has no item tool; its items are tools, facts"),
        ("stages.facts=2", "--set stages.facts=2: stages is not a mapping; write --set stages=VALUE"),
        (
            "stages.facts.steps.x=2",
            "--set stages.facts.steps.x=2: stages[1].steps is not a mapping; write --set stages.facts.steps=VALUE",
        ),
        ("stages.facts.steps=0", "--set stages.facts.steps=0: stages[1].steps must be at least 1, not 0"),
    ],
)
def test_a_wrong_override_in_a_list_is_named_as_such(tmp_path: Path, override: str, expected: str) -> None:
    assert message(tmp_path, STAGES, override) == expected


def test_an_item_whose_name_is_a_number_is_found_and_then_refused(tmp_path: Path) -> None:
    assert "stages[1].name must be text, not 5" in message(tmp_path, STAGES.replace("facts,", "5,"), "stages.5.steps=2")


def test_an_override_that_is_not_yaml_is_an_error(tmp_path: Path) -> None:
    assert message(tmp_path, GOOD, "data.system=[a").startswith("--set data.system=[a: the value is not valid YAML")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "my.yaml: the file is empty"),
        ("# only this\n", "my.yaml: the file is empty"),
        ("- a\n- b\n", "my.yaml: the file must be a mapping of settings (key: value), not a list"),
        ("model: a\ndata: [\n", "my.yaml:3: "),
        ("model: a\n\tdata: b\n", "my.yaml:2: "),
        ("model: a\nseed: 1\nmodel: b\n", "my.yaml:3: the key model is given twice (first in line 1); remove one"),
        ("data:\n  train: a\n  train: b\n", "my.yaml:3: the key train is given twice (first in line 2)"),
        ("model: !!python/object:os.system x\n", "my.yaml:1: could not determine a constructor for the tag"),
        ("model: &a\n  b: *a\n", "my.yaml:1: found unconstructable recursive node"),
        ("model: a\n---\nmodel: b\n", "my.yaml:2: expected a single document"),
        ("[a]: b\n", "my.yaml:1: a key must be plain text"),
        ("{model: a, seed: " + "[" * 5000, "my.yaml:1: "),
    ],
)
def test_a_file_that_is_not_a_mapping_in_yaml_is_an_error(tmp_path: Path, text: str, expected: str) -> None:
    assert message(tmp_path, text).startswith(expected)


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(GOOD)
    with pytest.raises(UserError, match=r"mi\.yaml: no such file; did you mean .*my\.yaml\?"):
        load_config(tmp_path / "mi.yaml")
    with pytest.raises(UserError, match="this is a folder"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: m\ndata: \xe4\n")
    with pytest.raises(UserError, match=r"latin\.yaml:2: this line is not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_files_are_looked_for_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    check_files(load(tmp_path, GOOD, "data.train=data/train.jsonl"), tmp_path)
    check_files(load(tmp_path, GOOD, "data.train=owner/a-hub-set"), tmp_path)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train=data/trian.jsonl", "data.train: .* does not exist; did you mean train.jsonl?"),
        ("data.train=dta/train.jsonl", "data.train: .* nor does its folder .*dta; did you mean data?"),
        ("data.train=data", "data.train: .* is a folder"),
        ("data.train=my.yaml", "data.train: .* must be a .jsonl or .parquet file"),
        ("data.template=papre", "data.template: .* does not exist"),
        ("evaluation.sets=[{name: a, file: q.jsonl, grader: exact}]", r"evaluation.sets\[0\].file: .* does not exist"),
    ],
)
def test_a_missing_file_is_named_with_its_key(tmp_path: Path, override: str, expected: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}")
    config = load(tmp_path, GOOD.replace("train.jsonl", "data/train.jsonl"), override)
    with pytest.raises(UserError, match=expected):
        check_files(config, tmp_path)


def test_zero_stage_0_with_bfloat16_is_refused_for_it_would_lose_the_masters(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model: m\ndata: {train: t.jsonl}\ntraining: {steps: 1}\nlearner: {zero_stage: 0}\n")
    with pytest.raises(UserError, match="zero_stage 0 keeps no float32 masters"):
        load_config(path, ["dtype=bfloat16"])
    assert load_config(path, ["dtype=float32"]).learner.zero_stage == 0


@pytest.mark.parametrize(
    ("given", "dtype", "expected"), [("", "float32", 0), ("", "bfloat16", 1), ("ranks: 2", "float32", 1)]
)
def test_the_default_zero_stage_is_0_for_one_rank_in_float32(
    tmp_path: Path, given: str, dtype: str, expected: int
) -> None:
    config = load(tmp_path, f"{GOOD}learner: {{{given}}}\n", f"dtype={dtype}", "training.batch_size=2")
    assert config.learner.zero_stage_for(config.dtype) == expected
    chosen = config.learner.model_copy(update={"zero_stage": 2})
    assert chosen.zero_stage_for(config.dtype) == 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_learner_rank_has_a_rollout_of_each_step(device: str, tmp_path: Path) -> None:
    ranks = (f"device={device}", "learner.ranks=8", "training.batch_size=4")
    assert load(tmp_path, GOOD, *ranks, "sampling.generations=2").learner.ranks == 8
    with pytest.raises(UserError, match=r"learner\.ranks 8 must not exceed the 4 rollouts of a step"):
        load(tmp_path, GOOD, *ranks)
    stage = "{name: a, data: {train: t.jsonl}, steps: 2, sampling: {generations: 1}}"
    stages = f"model: m\ntraining: {{}}\nsampling: {{generations: 2}}\nstages: [{stage}]\n"
    with pytest.raises(UserError, match=r"learner\.ranks 8 must not exceed the 4 rollouts of a step"):
        load(tmp_path, stages, *ranks)


@pytest.mark.parametrize("native", [True, False])
def test_the_dtype_is_one_that_the_processor_has_instructions_for_unless_it_is_given(
    native: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (dtype, summary):
        monkeypatch.setattr(module, "has_bfloat16", lambda: native)
    usual = "bfloat16" if native else "float32"
    assert load(tmp_path, GOOD).dtype == load(tmp_path, GOOD, "dtype=auto").dtype == usual
    assert load(tmp_path, GOOD, "device=cuda").dtype == "bfloat16"
    assert dtype_lines(load(tmp_path, GOOD, "device=cuda")) == dtype_lines(load(tmp_path, GOOD)) == []
    given = load(tmp_path, GOOD, "dtype=bfloat16")
    assert given.dtype == "bfloat16"
    assert [line[:43] for line in dtype_lines(given)] == (
        [] if native else ["warning: this processor has no instructions"]
    )
    # A run's files keep the dtype of the run, on whatever machine they are read.
    assert f"dtype: {usual}\n" in resolved_yaml(load(tmp_path, GOOD))


def test_the_processors_flags_agree_with_torch_about_bfloat16(tmp_path: Path) -> None:
    assert has_bfloat16() == torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for flags, has in {"flags : fpu avx2": False, "flags : fpu avx512bw": True, "Features : asimd bf16": True}.items():
        (tmp_path / "cpuinfo").write_text(f"model name : bf16\n{flags}\n")
        assert has_bfloat16(tmp_path / "cpuinfo") == has
    assert not has_bfloat16(tmp_path / "nothing")


def test_a_configuration_with_absolute_paths_means_the_same_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train.jsonl", "eval.jsonl", "my.jinja"):
        (tmp_path / name).touch()
    (tmp_path / "turn").mkdir()  # has the name of a built-in template, which has priority
    (tmp_path / "elsewhere" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    sets = "evaluation: {sets: [{name: a, file: eval.jsonl, grader: exact}]}\n"
    config = with_absolute_paths(load(tmp_path, GOOD + sets, "data.template=turn"), tmp_path)
    assert config.data is not None
    assert config.data.template == "turn"
    assert config.data.train == str(tmp_path / "train.jsonl")
    assert config.evaluation.sets[0].file == str(tmp_path / "eval.jsonl")
    assert config.model == str(tmp_path / "elsewhere" / "m")  # found from the working directory
    own = with_absolute_paths(load(tmp_path, GOOD, "data.template=my.jinja", "model=smollm2-135m"), tmp_path)
    assert own.data is not None
    assert (own.data.template, own.model) == (str(tmp_path / "my.jinja"), "smollm2-135m")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            "{train: t, format: sharegtp}",
            'my.yaml: data.format must be messages or sharegpt or alpaca, not the text "sharegtp"; did you mean '
            "sharegpt?",
        ),
        (
            "{train: t, columns: {instruction: x}}",
            "my.yaml: data: columns.instruction is not a column of format: messages; its columns are prompt, "
            "demonstration, id, context, feedback, answer, text, tools, teacher",
        ),
        (
            "{train: t, format: alpaca, columns: {prompt: x}}",
            "my.yaml: data: columns.prompt is not a column of format: alpaca; its columns are instruction, input, "
            "output, system, history, id, context, feedback, answer, text, tools, teacher",
        ),
    ],
)
def test_a_mistake_in_the_format_of_data_is_one_sentence(tmp_path: Path, data: str, expected: str) -> None:
    assert message(tmp_path, f"model: m\ndata: {data}\ntraining: {{epochs: 1}}\n") == expected
