"""Reasoning before an answer is hidden from graders and judges."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sdft.services.config.evaluation import EvaluationSet, JudgeConfig
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.thoughts import MARKS, ReplyText, without_thoughts
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.grading.grade import grade
from sdft.services.grading.judge import verdict
from tests.services.grading.test_judge import Endpoint, endpoint

__all__ = ["endpoint"]  # the fixture

CALL = 'Action: look\nAction Input: {"at": "sea"}'
GOLD = [{"Action": "look", "Action_Input": {"at": "sea"}}]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Rome", "Rome"),
        ("<think>Perhaps Paris. No.</think>Rome", "Rome"),
        ("<think>\nParis?\n</think>\n\nRome\n", "\n\nRome\n"),
        ("Perhaps Paris. No.</think>Rome", "Rome"),  # the prompt ended with <think>
        ("<think>Paris, or", ""),
        ("<think>a</think>Rome<think>or", ""),
        ("Look: <think>a</think>Rome, <think>b</think>Italy", "Look: Rome, Italy"),
        ("<think>a<think>b</think>c</think>Rome", "Rome"),
        ("[THINK]Paris[/THINK]Rome", "Rome"),
        ("I think <b>Rome</b> [think]", "I think <b>Rome</b> [think]"),
        ("<reasoning>Paris</reasoning><answer>B</answer>", "<reasoning>Paris</reasoning><answer>B</answer>"),
    ],
)
def test_reasoning_is_removed_from_a_reply(text: str, answer: str) -> None:
    assert without_thoughts(text) == answer


def graded(grader: Any, answer: Any, *replies: str, judge: JudgeConfig | None = None) -> list[bool]:
    settings = EvaluationSet(name="q", file="f", grader=grader, judge=judge)
    question = Record("q", (Message(role="user", content="?"),), None, None, None, answer, "f:1")
    return asyncio.run(grade(settings, [question] * len(replies), replies, 20))


@pytest.mark.parametrize(
    ("grader", "answer", "right", "wrong"),
    [
        ("contains", "Rome", "Rome", "Paris"),
        ("exact", "Rome", "\nRome", "Paris"),
        ("choice", "B", "<answer>B</answer>", "<answer>A</answer>"),
        ("numeric", 4, "It is 4.", "It is 5."),
        ("tool_call", GOLD, CALL, CALL.replace("sea", "sky")),
        ("instruction", [{"rule": "words_at_most", "n": 3}], "At the sea", "I am at the sea"),
    ],
)
def test_a_grader_sees_the_answer_alone(grader: Any, answer: Any, right: str, wrong: str) -> None:
    """A right answer in the reasoning does not count, and a wrong one there does no harm."""
    replies = [f"<think>{wrong} No.</think>{right}", f"<think>{right} No.</think>{wrong}", f"<think>{right}", right]
    assert graded(grader, answer, *replies) == [True, False, False, True]


def test_a_judge_sees_the_answer_alone_and_gets_no_empty_ones(endpoint: JudgeConfig) -> None:
    replies = ["<think>that</think>No", "<think>hm</think>It is that", "<think>that", " "]
    assert graded("judge", "that", *replies, judge=endpoint) == [False, True, False, False]
    assert len(Endpoint.asked) == 2
    assert not any("hm" in body["messages"][0]["content"] for body in Endpoint.asked)
    assert graded("judge", "that", "<think>that", judge=endpoint) == [False]


def test_a_judges_own_reasoning_may_have_any_of_the_marks() -> None:
    assert [verdict(f"{begin}yes? no{end} Yes.") for begin, end in MARKS] == [True] * len(MARKS)


@pytest.mark.parametrize("special", [False, True])
def test_the_marks_of_reasoning_stay_in_a_replys_text(tiny_model: Path, special: bool) -> None:
    tokenizer: Any = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
    text = ReplyText(tokenizer)
    prompt = tokenizer.encode("<|im_start|>assistant\n")
    assert text(prompt, tokenizer.encode("<think>Paris?</think>Rome<|im_end|>")) == "<think>Paris?</think>Rome"
    opened = tokenizer.encode("<|im_start|>assistant\n<think>\n")
    assert text(opened, tokenizer.encode("Paris?")) == "<think>Paris?"
    closed = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert text(closed, tokenizer.encode("Rome<|im_end|>")) == "Rome"
