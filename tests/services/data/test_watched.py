"""What is looked for in completions: the words of a teacher's template, and marks of reasoning, as tokens."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdft.learner.completions import Tokens
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.watched import watched

ROW = Record(
    id="r",
    messages=(Message(role="user", content="Say number 1."),),
    demonstration="Thought: it is one. Action: say it aloud.",
    context="Counting begins with it.",
    feedback=None,
    answer=None,
    where="f:1",
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def occurs(wanted: tuple[Tokens, ...], text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return any(tuple(ids[i : i + len(w)]) == w for w in wanted for i in range(len(ids)))


def template(tokenizer: PreTrainedTokenizerBase, name: str, base: Path) -> tuple[Tokens, ...]:
    return watched(tokenizer, PromptBuilder(tokenizer, name, base, None), ROW).template


def test_the_words_of_a_template_are_its_own_and_not_those_of_a_row(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    wanted = template(tokenizer, "paper", tmp_path)
    assert occurs(wanted, "As in the example for a response, it is 1.", tokenizer)
    assert occurs(wanted, "including the thinking process", tokenizer)
    for learnt in ("Say number 1.", "Thought: it is one. Action: say it aloud.", str(ROW.context)):
        assert not occurs(wanted, learnt, tokenizer)


def test_a_users_template_has_words_and_one_that_adds_none_has_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "own.jinja").write_text("{{ prompt }} An expert once wrote this down: {{ demonstration }}")
    (tmp_path / "picky.jinja").write_text("{{ prompt }} {{ demonstration.missing.attribute }}")
    assert occurs(template(tokenizer, "own.jinja", tmp_path), "Once an expert once wrote this down.", tokenizer)
    for name in ("none", "picky.jinja"):
        assert template(tokenizer, name, tmp_path) == ()
    alone = replace(ROW, context=None)
    assert watched(tokenizer, PromptBuilder(tokenizer, "turn", tmp_path, None), alone).template == ()


def test_phrases_of_a_user_are_found_where_they_may_stand(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    builder = PromptBuilder(tokenizer, "none", tmp_path, None)
    wanted = watched(tokenizer, builder, ROW, ["Following the example", "as shown"]).template
    for text in ("A line.\nFollowing the example, it is 1.", "It is 1 as shown.", "So as shown: 1", "as shown so 1"):
        assert occurs(wanted, text, tokenizer), text
    for text in ("Following the examples", "It is not shown.", "An example."):
        assert occurs(wanted, text, tokenizer) == text.startswith("Following the example"), text


def test_marks_of_reasoning_are_found_whatever_follows_them(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """In this tokenizer they are ordinary text, of several tokens each."""
    marks = watched(tokenizer, PromptBuilder(tokenizer, "none", tmp_path, None), ROW).thoughts
    for text in ("<think>\nIt is one.", "<think>It is", "so</think>\n\n1", "[THINK] one"):
        assert occurs(marks, text, tokenizer), text
    assert not occurs(marks, "I think that 1 < 2, so [this] is <b>one</b>.", tokenizer)


def test_a_mark_that_is_one_token_is_looked_for_as_that_token(tiny_model: Path, tmp_path: Path) -> None:
    own = AutoTokenizer.from_pretrained(tiny_model)
    own.add_tokens(["<think>", "</think>"], special_tokens=True)
    begin, end = own.convert_tokens_to_ids(["<think>", "</think>"])
    assert {(begin,), (end,)} < set(watched(own, PromptBuilder(own, "none", tmp_path, None), ROW).thoughts)
