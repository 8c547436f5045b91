"""The graders: what each accepts, what it refuses, and which answers it can use."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from sdft.services.config.evaluation import Grader
from sdft.services.grading.graders import GRADERS, choice, contains, exact, instruction, numeric, tool_call

PAPER_TOOL_USE = Path(__file__).parents[4] / "shared" / "data" / "tooluse_eval.jsonl"


def as_text(calls: list[dict[str, Any]]) -> str:
    return "\n".join(f"Action: {call['Action']}\nAction Input: {call['Action_Input']}" for call in calls)


def test_the_graders_are_those_of_the_configuration() -> None:
    assert (*GRADERS, "environment", "judge", "perplexity") == get_args(Grader)


def test_exact_compares_the_stripped_reply_with_each_accepted_string() -> None:
    assert exact.grade("  Oslo\n", "Oslo")
    assert exact.grade("Oslo", ["Bergen", "Oslo"])
    assert not exact.grade("oslo", "Oslo")
    assert not exact.grade("It is Oslo", "Oslo")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("2 + 2 is 4.", 4),
        ("first 3, then 5", "5"),
        ("It costs 1,234.50 dollars", 1234.5),
        ("about -7", "-7"),
        ("about −7", -7),
        ("x = .5", 0.5),
        ("6.02e23", 6.02e23),
        ("3.14", {"value": 3.14159, "tolerance": 0.01}),
        ("in 2024-11", 11),
        ("**42**", 42),
        ("The point is (3,4).", 4),
        ("(3,-4)", -4),
        ("x,.5", 0.5),
        ("1,000,12", 12),
        ("1000,2000", 2000),
        ("it is 3,400", 3400),
    ],
)
def test_numeric_takes_the_last_number(text: str, answer: Any) -> None:
    assert numeric.check_answer(answer) is None
    assert numeric.grade(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("none", 4),
        ("4, no, 5", 4),
        ("44", 4),
        ("4.5", 4),
        ("x4", 4),
        ("-4", 4),
        ("3.2", {"value": 3.14159, "tolerance": 0.01}),
        ("1,2345", 2345),
        ("The point is (3,4).", 3),
        ("12,345", 345),
    ],
)
def test_numeric_refuses_other_numbers(text: str, answer: Any) -> None:
    assert not numeric.grade(text, answer)


@pytest.mark.parametrize("answer", [None, True, "four", "4 or 5", [4], {"value": 4}, float("nan"), 10**400, "1" * 400])
def test_numeric_needs_a_number(answer: Any) -> None:
    assert "answer must be a number" in str(numeric.check_answer(answer))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 5.", "5"),
        ("5, of course", "5"),
        ("between 3-5 days", "5"),
        ("It is OSLO!", "oslo"),
        ("**Oslo**", "Oslo"),
        ("in New\n York today", "new york"),
        ("seven days", ["7", "seven"]),
        ("it costs US$5", "$5"),
        ("written in C++.", "c++"),
        ("minus five is -5", "-5"),
        ("1.Paris", "Paris"),
        ("1889,Paris", "Paris"),
    ],
)
def test_contains_finds_an_accepted_string_as_whole_words(text: str, answer: str | list[str]) -> None:
    assert contains.grade(text, answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("15", "5"),
        ("5.2", "5"),
        ("1.5", "5"),
        ("5,000 people", "5"),
        ("-5 degrees", "5"),
        ("x5", "5"),
        ("price", "ice"),
        ("icecream", "ice"),
        ("c plus plus", "c++"),
        ("1,889", "889"),
        ("", ["a", "b"]),
    ],
)
def test_contains_refuses_parts_of_words_and_numbers(text: str, answer: str | list[str]) -> None:
    assert not contains.grade(text, answer)


@pytest.mark.parametrize("grader", [exact, contains])
def test_exact_and_contains_take_a_string_or_a_list_of_strings(grader: Any) -> None:
    assert grader.check_answer("a") is None
    assert grader.check_answer(["a", "b"]) is None
    for bad in (5, None, {"a": 1}, ["a", 5]):
        assert grader.check_answer(bad) == "answer must be a string or a list of strings"
    assert grader.check_answer([]) == "answer must list at least one string"
    assert grader.check_answer(["a", " "]) == "answer must not hold a blank string"


def test_choice_reads_the_last_answer_tag() -> None:
    assert choice.grade("<reasoning>…</reasoning><answer>B</answer>", "B")
    assert choice.grade("<answer>A</answer> no: <answer>\n B </answer>", "B")
    assert choice.grade("<answer> well, <answer>B</answer>", "B")
    assert not choice.grade("<answer>B</answer> no: <answer>A</answer>", "B")
    assert not choice.grade("<answer>B</answer> no: <answer>A or B</answer>", "B")
    assert not choice.grade("The answer is B", "B")


def test_choice_takes_one_capital_letter() -> None:
    assert choice.check_answer("D") is None
    for bad in ("d", "AB", "", ["A"], 1, "A\n"):
        assert choice.check_answer(bad) == "answer must be a single letter A to Z"


def test_tool_call_compares_the_multiset_of_names_and_the_merged_arguments() -> None:
    answer = [
        {"Action": "find", "Action_Input": '{"query": "a", "page": 1}'},
        {"Action": "save", "Action_Input": {"folder": {"name": "b"}}},
    ]
    calls = [
        'Action: find\nAction Input: {"page": 1, "query": "a"}',
        'Action: save\nAction Input: {"folder": {"name": "b"}}',
    ]
    assert tool_call.check_answer(answer) is None
    assert tool_call.grade("Thought: two calls\n" + "\n".join(calls) + "\nDone.", answer)
    assert tool_call.grade("\n\nThen\n".join(reversed(calls)), answer)
    assert tool_call.grade("\n".join(calls).replace("\n", "\r\n"), answer)
    assert not tool_call.grade(calls[0], answer)
    assert not tool_call.grade("\n".join([*calls, calls[0]]), answer)
    assert not tool_call.grade("\n".join(calls).replace('"b"', '"c"'), answer)
    assert not tool_call.grade("\n".join(calls).replace("save", "store"), answer)


@pytest.mark.parametrize(
    ("wanted", "given", "equal"),
    [
        ({"on": True}, {"on": 1}, False),
        ({"on": [{"a": 0}]}, {"on": [{"a": False}]}, False),
        ({"on": [{"a": False}]}, {"on": [{"a": False}]}, True),
        ({"on": 1}, {"on": 1.0}, True),
        ({"on": [1, 2]}, {"on": [1]}, False),
        ({"on": {"a": 1}}, {"on": {"b": 1}}, False),
        ({"on": {}}, {"on": []}, False),
        ({"on": None}, {"on": None}, True),
    ],
)
def test_tool_call_compares_arguments_as_json_does(wanted: Any, given: Any, equal: bool) -> None:
    reply = as_text([{"Action": "f", "Action_Input": json.dumps(given)}])
    assert tool_call.grade(reply, [{"Action": "f", "Action_Input": wanted}]) is equal


def test_tool_call_merges_arguments_in_order_so_the_last_value_counts() -> None:
    answer = [{"Action": "f", "Action_Input": '{"x": 1}'}, {"Action": "f", "Action_Input": '{"x": 2}'}]
    assert tool_call.grade(as_text(answer), answer)
    assert not tool_call.grade(as_text(answer[::-1]), answer)


def test_tool_call_reads_json_and_not_braces() -> None:
    arguments = {"a": {"b": {"c": "}"}}, "text": "say\nAction: nothing {"}
    text = f"Action: f\nAction Input: {json.dumps(arguments, indent=2)} and more {{}}"
    assert tool_call.grade(text, [{"Action": "f", "Action_Input": arguments}])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Action: f",
        "Action: f\nAction Input: none",
        "Action: f\nAction Input: [1]",
        'Action: f\nAction Input: {"x": 1',
        'Action: f\nAction Input: {"x": 1}\nAction: g',
        'Action: f\nAction Input: {"x": ' + "[" * 100_000,
        'Action: f\nAction Input: {"x": ' + "1" * 10_000 + "}",
    ],
)
def test_tool_call_calls_a_broken_reply_wrong(text: str) -> None:
    assert not tool_call.grade(text, [{"Action": "f", "Action_Input": {"x": 1}}])


def test_tool_call_says_what_is_wrong_with_an_answer() -> None:
    good = {"Action": "f", "Action_Input": "{}"}
    bad_ones: tuple[object, ...] = ("f", [], {}, ["f"], [{"Action": "f"}], [{**good, "more": 1}])
    for bad in bad_ones:
        assert (tool_call.check_answer(bad) or "").startswith("answer must be a list of")
    assert tool_call.check_answer([good, {**good, "Action": ""}]) == "Action of call 2 must be a tool's name"
    for bad_input in (5, "[]", "{", "{} {}"):
        reason = tool_call.check_answer([{**good, "Action_Input": bad_input}])
        assert reason == "Action_Input of call 1 must be a JSON object or its text"


RULES_KEPT: list[tuple[str, dict[str, Any]]] = [
    ("It rains.\nIt pours.", {"rule": "lines", "n": 2}),
    ("It rains. It pours!", {"rule": "sentences", "n": 2}),
    ("At 3.5 degrees it snows.", {"rule": "sentences", "n": 1}),
    ("- a\n- b", {"rule": "bullets", "n": 2}),
    ("1. a\n2. b\n3) c", {"rule": "numbered", "n": 3}),
    ("I like YELLOW things", {"rule": "contains", "text": "yellow"}),
    ("Other people", {"rule": "lacks", "text": "the"}),
    ("Sometimes it rains", {"rule": "starts_with", "text": "Sometimes"}),
    ("Does it?", {"rule": "ends_with", "text": "?"}),
    ("a well-known dog", {"rule": "words_at_most", "n": 3}),
    ("one two three", {"rule": "words_at_least", "n": 3}),
    ("RAIN, 3 TIMES", {"rule": "uppercase"}),
    ("rain, 3 times", {"rule": "lowercase"}),
    ('{"topic": "rain"}', {"rule": "json"}),
]
RULES_BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("It rains.", {"rule": "lines", "n": 2}),
    ("It rains", {"rule": "sentences", "n": 1}),
    ("- a\nb", {"rule": "bullets", "n": 2}),
    ("a 1. b", {"rule": "numbered", "n": 1}),
    ("yellowish", {"rule": "contains", "text": "yellow"}),
    ("Not the one", {"rule": "lacks", "text": "the"}),
    ("sometimes", {"rule": "starts_with", "text": "Sometimes"}),
    ("Does it? No.", {"rule": "ends_with", "text": "?"}),
    ("one two three four", {"rule": "words_at_most", "n": 3}),
    ("...", {"rule": "words_at_most", "n": 3}),
    ("one two", {"rule": "words_at_least", "n": 3}),
    ("Rain", {"rule": "uppercase"}),
    ("123", {"rule": "uppercase"}),
    ("Rain", {"rule": "lowercase"}),
    ('Here it is: {"topic": "rain"}', {"rule": "json"}),
    ("[1]", {"rule": "json"}),
]


@pytest.mark.parametrize(("text", "rule"), RULES_KEPT)
def test_instruction_sees_a_rule_that_is_kept(text: str, rule: dict[str, Any]) -> None:
    assert instruction.check_answer([rule]) is None
    assert instruction.grade(f" {text}\n", [rule])


@pytest.mark.parametrize(("text", "rule"), RULES_BROKEN)
def test_instruction_sees_a_rule_that_is_broken(text: str, rule: dict[str, Any]) -> None:
    assert not instruction.grade(text, [rule])
    assert not instruction.grade("", [rule])


def test_instruction_wants_every_rule_kept() -> None:
    rules = [{"rule": "lines", "n": 1}, {"rule": "lowercase"}]
    assert instruction.grade("rain", rules)
    assert not instruction.grade("rain\nrain", rules)
    assert {rule["rule"] for _, rule in (*RULES_KEPT, *RULES_BROKEN)} == set(instruction.RULES)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([], "a list of rules"),
        ("lines", "a list of rules"),
        (["lines"], "rule 1 must be one of contains, lacks"),
        ([{"rule": "rhyme"}], "rule 1 must be one of"),
        ([{"rule": ["lines"], "n": 3}], "rule 1 must be one of"),
        ([{"rule": "json"}, {"rule": "lines"}], "rule 2, lines, must have the parameter n and no other"),
        ([{"rule": "json", "n": 1}], "rule 1, json, must have no parameter"),
        ([{"rule": "lines", "n": True}], "rule 1: n must be a whole number"),
    ],
)
def test_instruction_says_what_is_wrong_with_rules(answer: Any, reason: str) -> None:
    assert reason in str(instruction.check_answer(answer))


def test_the_papers_own_answers_pass_the_tool_call_grader() -> None:
    if not PAPER_TOOL_USE.exists():
        pytest.skip(f"{PAPER_TOOL_USE} is not here: the paper's tool-use evaluation is not part of this project")
    answers = [json.loads(line)["golden_answer"] for line in PAPER_TOOL_USE.read_text().splitlines()]
    assert len(answers) == 97
    assert all(tool_call.check_answer(answer) is None for answer in answers)
    assert sum(tool_call.grade(as_text(answer), answer) for answer in answers) >= 95
    shifted = zip(answers, answers[1:] + answers[:1], strict=True)
    assert sum(tool_call.grade(as_text(answer), other) for answer, other in shifted) <= 5
