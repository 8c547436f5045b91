"""What is looked for in completions: words of the teacher's template, a user's phrases, and marks of reasoning.

    teacher's prompt with placeholders ─► n-grams of every filling, without the student's prompt's ─► the template's own
    <think>, with different texts behind it ─► tokens that all have at the start ─► the mark

A record's context and demonstration are no words of the template: a student may well learn to say them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sdft.learner.completions import Tokens, Watched
from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.thoughts import MARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORDS = 5  # tokens of an n-gram of the template; shorter ones are in many answers by chance
FILLINGS = (("0", "1"), ("Well?", "Yes."))  # question, and what else is shown
LEAD = "A line.\n"
BEHIND = ("", "\n", " so", "So")  # a tokenizer may join the end of a mark with what follows it


def watched(
    tokenizer: "PreTrainedTokenizerBase", builder: PromptBuilder, record: Record, phrases: Sequence[str] = ()
) -> Watched:
    """Return what is looked for in the completions of a stage. record: one with the same columns.

    phrases: texts that count as words of the template.
    """
    marks = [mark for pair in MARKS for mark in pair]
    thoughts = dict.fromkeys(_mark(tokenizer, mark) for mark in marks)
    words = dict.fromkeys(_template(tokenizer, builder, record))
    words |= dict.fromkeys(tokens for phrase in phrases for tokens in _phrase(tokenizer, phrase))
    return Watched(tuple(words), tuple(tokens for tokens in thoughts if tokens))


def _template(tokenizer: "PreTrainedTokenizerBase", builder: PromptBuilder, record: Record) -> tuple[Tokens, ...]:
    """Return the n-grams of the template's own words; none if it adds none, or accepts no placeholder."""
    columns = [name for name in ("demonstration", "context", "feedback") if getattr(record, name) is not None]
    teachers, students = [], []
    for question, text in FILLINGS:
        shown: dict[str, Any] = dict.fromkeys(columns, text)
        filled = replace(record, messages=(Message(role="user", content=question),), **shown)
        try:
            teachers.append(_grams(builder.teacher(filled) or []))
        except UserError:  # of a user's template: rows are rendered, and reported, elsewhere
            return ()
        students.append(_grams(builder.student(filled)))
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return tuple(
        gram
        for gram in teachers[0]
        if all(gram in grams for grams in teachers)
        and not any(gram in grams for grams in students)
        and special.isdisjoint(gram)
    )


def _grams(ids: Sequence[int]) -> dict[Tokens, None]:
    """Return the n-grams in their order, each once."""
    return dict.fromkeys(tuple(ids[i : i + WORDS]) for i in range(len(ids) - WORDS + 1))


def _phrase(tokenizer: "PreTrainedTokenizerBase", phrase: str) -> Iterator[Tokens]:
    """Yield the tokens of a phrase at the start of a line and behind a word, alone and before what may follow it."""
    for start in ("", " "):
        for end in ("", ",", ".", ":", "\n", " so"):
            whole, rest = (_behind(tokenizer, f"{start}{text}") for text in (f"{phrase}{end}", f"{phrase}"))
            same = next((i for i, (a, b) in enumerate(zip(whole, rest, strict=False)) if a != b), len(rest))
            # A last token that joins the end of the phrase with what follows it belongs to the phrase.
            found = whole[: same + (same < len(rest))]
            if phrase in str(tokenizer.decode(list(found), skip_special_tokens=False)):
                yield found


def _mark(tokenizer: "PreTrainedTokenizerBase", mark: str) -> Tokens:
    """Return the tokens that a mark always begins with; none if they are not all of it but its last character."""
    found = [_behind(tokenizer, f"{mark}{text}") for text in BEHIND]
    shortest = min(map(len, found))
    same = next((i for i in range(shortest) if len({ids[i] for ids in found}) > 1), shortest)
    begin = found[0][:same]
    return begin if mark[:-1] in str(tokenizer.decode(list(begin), skip_special_tokens=False)) else ()


def _behind(tokenizer: "PreTrainedTokenizerBase", text: str) -> Tokens:
    """Return the tokens of a text behind another one: some tokenizers treat the beginning of a text in another way."""
    before, whole, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (LEAD, f"{LEAD}{text}", text))
    return tuple(whole[len(before) :] if whole[: len(before)] == before else alone)
