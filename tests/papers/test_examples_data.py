"""The example data: reproducible byte for byte, no held-out row in training, answers that their grader accepts."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft.services.cli.main import main
from sdft.services.config.load import load_config
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.grading.graders import GRADERS

EXAMPLES = Path(__file__).parents[2] / "examples"
GRADER_OF = {
    "tools/train": "tool_call",
    "tools/heldout": "tool_call",
    "facts/train": "contains",
    "facts/direct": "contains",
    "facts/indirect": "contains",
    "facts/reworded": "contains",
    "facts/articles": "contains",
    "general/retention": "contains",
    "general/instructions": "instruction",
    "continual/tools-heldout": "tool_call",
    "continual/routing-train": "exact",
    "continual/routing-heldout": "exact",
}


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def prompts(name: str) -> set[str]:
    return {row["prompt"] for row in read(name)}


def request(row: dict[str, Any]) -> str:
    return row["prompt"].split("\nQuestion: ")[1]


def values(row: dict[str, Any]) -> dict[str, Any]:
    return row["answer"][0]["Action_Input"]


def wording(row: dict[str, Any]) -> str:
    """Return the request with every value replaced by the name of its parameter."""
    text = request(row)
    for parameter, value in values(row).items():
        text, count = re.subn(rf"\b{re.escape(str(value))}\b", f"{{{parameter}}}", text)
        assert count == 1, (row["id"], parameter)
    return text


def words(sentence: str) -> tuple[str, ...]:
    """Return the sorted words: equal for "The capital of A is B." and "B is the capital of A."."""
    return tuple(sorted(re.findall(r"\w+", sentence.lower())))


@pytest.mark.parametrize("example", ["tools", "facts", "continual"])
def test_make_data_writes_the_committed_files_byte_for_byte(example: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / example / "make_data.py", tmp_path], check=True, timeout=60)
    committed = {path.name: path.read_bytes() for path in (EXAMPLES / example).glob("*.jsonl")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed


@pytest.mark.parametrize("name", GRADER_OF)
def test_rows_have_unique_ids_and_prompts_and_answers_that_their_grader_can_use(name: str) -> None:
    rows = read(name)
    assert len({row["id"] for row in rows}) == len(rows)
    assert len(prompts(name)) == len(rows)
    assert [GRADERS[GRADER_OF[name]].check_answer(row["answer"]) for row in rows] == [None] * len(rows)


@pytest.mark.parametrize("name", [name for name in GRADER_OF if not name.startswith("general/")])
def test_every_demonstration_is_right_and_no_prompt_is(name: str) -> None:
    grader = GRADERS[GRADER_OF[name]]
    for row in read(name):
        assert grader.grade(row["demonstration"], row["answer"]), row["id"]
        assert not grader.grade(row["prompt"], row["answer"]), row["id"]


def test_there_are_enough_rows_to_train_on_and_to_measure_with() -> None:
    sizes = {name: len(read(name)) for name in GRADER_OF}
    assert sizes == {
        "tools/train": 120,
        "tools/heldout": 80,
        "facts/train": 24,
        "facts/direct": 24,
        "facts/indirect": 48,
        "facts/reworded": 48,
        "facts/articles": 24,
        "general/retention": 69,
        "general/instructions": 1000,
        "continual/tools-heldout": 120,
        "continual/routing-train": 120,
        "continual/routing-heldout": 120,
    }


@pytest.mark.parametrize("name", ["tools/heldout", "continual/tools-heldout"])
def test_held_out_tool_requests_use_the_trained_tools_in_new_words_with_new_values(name: str) -> None:
    train, heldout = read("tools/train"), read(name)
    assert {row["answer"][0]["Action"] for row in heldout} == {row["answer"][0]["Action"] for row in train}
    assert not {wording(row) for row in heldout} & {wording(row) for row in train}
    trained_text = "\n".join(request(row) + "\n" + row["demonstration"] for row in train)
    held_out_values = {str(value) for row in heldout for value in values(row).values()}
    assert [v for v in held_out_values if re.search(rf"\b{re.escape(v)}\b", trained_text, re.IGNORECASE)] == []


def test_held_out_messages_go_to_the_trained_desks_in_new_words_with_new_numbers() -> None:
    def parts(name: str) -> tuple[set[str], set[str], set[str]]:
        """Return the prompts without numbers, the numbers, and the answers without their number."""
        rows = [(row["prompt"], *row["answer"].rsplit(" ", 1)) for row in read(name)]
        assert all(re.search(rf"\b{number}\b", prompt) for prompt, _, number in rows)
        return {re.sub(r"\d+", "", p) for p, _, _ in rows}, {n for _, _, n in rows}, {label for _, label, _ in rows}

    (trained, used, labels), (wordings, numbers, others) = map(
        parts, ("continual/routing-train", "continual/routing-heldout")
    )
    assert not trained & wordings
    assert not used & numbers
    desks = ("billing", "shipping", "technical", "account")
    assert labels == others == {f"Desk: {desk}, number" for desk in desks}


def test_facts_are_evaluated_as_trained_and_in_other_words() -> None:
    assert prompts("facts/direct") == prompts("facts/train")
    assert not prompts("facts/indirect") & prompts("facts/train")
    assert not prompts("facts/reworded") & (prompts("facts/train") | prompts("facts/indirect"))
    assert prompts("facts/articles") == prompts("facts/train")
    assert all(row["demonstration"] in row["context"] for row in read("facts/articles"))
    trained = {words(row["demonstration"]) for row in read("facts/train")}
    for name in ("indirect", "reworded"):
        assert {words(row["demonstration"]) for row in read(f"facts/{name}")} == trained


def test_the_instructions_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "general" / "make_instructions.py", tmp_path], check=True, timeout=60)
    name = "instructions.jsonl"
    assert (tmp_path / name).read_bytes() == (EXAMPLES / "general" / name).read_bytes()


def test_retention_questions_do_not_give_their_answer_away() -> None:
    for row in read("general/retention"):
        assert not GRADERS["contains"].grade(row["prompt"], row["answer"]), row["id"]


def test_the_passages_differ_and_are_short_enough_for_any_examples_prompts(smollm2: Path) -> None:
    rows = read("general/prose")
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == 120
    tokens = [len(ids) for ids in load_tokenizer(smollm2)([row["text"] for row in rows]).input_ids]
    assert sum(tokens) > 10_000
    assert max(tokens) <= 320


def test_general_prompts_are_none_of_the_retention_questions() -> None:
    rows = read("general/prompts")
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == 64
    assert not prompts("general/prompts") & prompts("general/retention")


def test_retention_questions_are_none_of_the_skills() -> None:
    skills = set().union(*(prompts(name) for name in GRADER_OF if not name.startswith("general/")))
    assert not (prompts("general/retention") | prompts("general/instructions")) & skills


def test_every_variant_of_the_sweep_is_a_configuration_and_has_a_name_of_its_own() -> None:
    sweep = runpy.run_path(str(EXAMPLES / "continual" / "sweep.py"))
    variants = [v for chosen in (*sweep["EXPERIMENTS"].values(), sweep["FULL"]) for v in chosen]
    named = {v.name: v for v in variants}
    assert all(named[v.name] == v for v in variants)
    for v in named.values():
        load_config(v.config, [f"{key}={json.dumps(value)}" for key, value in v.settings.items()])


CONFIGS = [
    "agent/agent.yaml",
    "tools/tools.yaml",
    "facts/facts.yaml",
    "continual/continual.yaml",
    "continual/reinvoke.yaml",
    "continual/recall.yaml",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_an_examples_configuration_is_good(smollm2: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2.is_dir()
    assert main(["check", str(EXAMPLES / config)]) == 0
    assert "valid; the longest teacher prompt has" in capsys.readouterr().out


def test_after_a_run_of_the_sweep_has_failed_no_other_begins(tmp_path: Path) -> None:
    sweep = [sys.executable, str(EXAMPLES / "continual" / "sweep.py"), "--runs", str(tmp_path), "--set", "nonsense=1"]
    result = subprocess.run(sweep, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    (begun,) = tmp_path.iterdir()
    assert "nonsense is not a setting" in (begun / "output.log").read_text()


def test_the_table_of_results_agrees_with_the_data_of_its_plot(tmp_path: Path) -> None:
    docs = EXAMPLES.parent / "docs"
    points: dict[str, list[list[float]]] = json.loads((docs / "sequence.json").read_text())
    methods = {"SDFT": "sdft", "SFT": "sft", "SFT with recall": "reinvoke", "DFT": "dft", "off-policy": "off_policy"}
    methods["SDFT with a sharpened teacher"] = "sharpened"
    told = {}
    for line in (docs / "results.md").read_text().splitlines():
        if row := re.match(r"\| ([A-Za-z -]+\w)(?: \(.*?\))?, lr (\S+)(?: \(.*?\))? \| (\d) \| (.*?) \|", line):
            name, rate, seeds, learnt = row.groups()
            told[f"{methods[name]}-{rate}"] = int(seeds), learnt, line.split(" | ")[-1].rstrip(" |")
    assert told.keys() == points.keys()
    for name, (seeds, learnt, kept) in told.items():
        assert seeds == len(points[name])
        for text, values in ((kept, [p[0] for p in points[name]]), (learnt, [p[1] for p in points[name]])):
            given = [float(number) for number in text.partition(" ±")[0].split("; ")]
            assert given == pytest.approx(values if seeds == 2 else [sum(values) / seeds], abs=0.11), name
    (tmp_path / "sequence.json").write_bytes((docs / "sequence.json").read_bytes())
    drawn: Path = runpy.run_path(str(EXAMPLES / "continual" / "sweep.py"))["plot"](tmp_path / "sequence.json")
    now, then = (path.read_text() for path in (drawn, docs / "sequence.svg"))
    assert now.count("<use") == then.count("<use")  # one dot per value; fonts shift its position slightly
