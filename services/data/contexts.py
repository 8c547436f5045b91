"""Prompts of student and teacher as token ids: the teacher's prompt also contains the demonstration."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdft.actors.shared.types import IntArray
from sdft.services.base.errors import UserError, first_line
from sdft.services.base.files import existing_file
from sdft.services.config.templates import BUILT_IN_TEMPLATES
from sdft.services.data.chat_template import ReplyEnd, left_out, reply_end
from sdft.services.data.demonstrations import Message, Record
from sdft.services.data.templates import UserTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REPORTED = 20
# Wording of the SDFT paper (arXiv 2601.19897). The paper has no wording for a context; it comes before the example.
_CONTEXT = "This is background for the question:\n{context}\n\n"
_PAPER = (
    "{question}\n\n{context}This is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
# As in self-distilled policy optimisation: feedback on an attempt takes the place of the example.
_FEEDBACK = (
    "{question}\n\nThis is feedback on an earlier response to the question:\n{feedback}\n\n"
    "Now answer with a response of your own that needs no such feedback."
)


@dataclass(frozen=True)
class PromptPair:
    """Token ids of one record's prompts; both end where the assistant's reply begins."""

    student_ids: IntArray  # [P]
    teacher_ids: IntArray | None  # [P]; None: the record has nothing for a teacher
    demonstration_ids: IntArray | None = None  # [T], as a reply, with the token that ends it

    @classmethod
    def of(cls, student: list[int], teacher: list[int] | None, demonstration: list[int] | None = None) -> "PromptPair":
        """Make a pair of a tokenizer's lists. Arrays take a ninth of their memory."""
        return cls(
            np.asarray(student, np.int32),
            None if teacher is None else np.asarray(teacher, np.int32),
            None if demonstration is None else np.asarray(demonstration, np.int32),
        )

    @property
    def parts(self) -> tuple[IntArray | None, ...]:
        """The three fields."""
        return self.student_ids, self.teacher_ids, self.demonstration_ids

    @property
    def encoded(self) -> bytes:
        """The token ids as JSON, for digests."""
        return json.dumps([None if ids is None else ids.tolist() for ids in self.parts]).encode()


class PromptBuilder:
    """Turns records into prompts with a tokenizer's chat template and a teacher template.

    `template` is "paper" (the last user message holds the example), "turn" (the demonstration is an earlier assistant
    turn), "context" (the background alone), "feedback" (feedback on an attempt), "none" (the teacher's prompt is the
    student's), or the path of a Jinja template, relative to the folder `base`, whose output is the teacher's last
    user message. `system` is prepended to records without a system message. `now` is the time for chat templates that
    write the date; None: the current time. UserError if the tokenizer has no usable chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        base: Path,
        system: str | None,
        now: datetime | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"model: the tokenizer in {tokenizer.name_or_path} has no chat template; use an instruct model, or put "
                "a chat_template.jinja into the folder"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise UserError(
                f"model: the tokenizer in {tokenizer.name_or_path} has chat templates named "
                f"{', '.join(sorted(tokenizer.chat_template))} and none named default; name one of them default, or "
                f"keep only one, in chat_template.jinja"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        self._now = now or datetime.now()
        self._user_template = None if template in BUILT_IN_TEMPLATES else _user_template(template, base)
        self._shown = self._user_template.shown if self._user_template else BUILT_IN_TEMPLATES[template]
        self._chat_template = f"the chat template of the tokenizer in {tokenizer.name_or_path}"
        self._end: ReplyEnd | None = None

    def student(self, item: Record) -> list[int]:
        """Token ids of the prompt alone."""
        return self._encode(self._with_system(item), item)

    def teacher(self, item: Record) -> list[int] | None:
        """Token ids of the prompt with the column that the template shows; None if the record lacks that column."""
        if self._shown is not None and getattr(item, self._shown) is None:
            return None
        messages = self._with_system(item)
        earlier, question = messages[:-1], messages[-1]["content"]
        if self._template == "none":
            turns = [messages[-1]]
        elif self._template == "context":
            turns = [_user(f"{_CONTEXT.format(context=item.context)}{question}")]
        elif self._template == "feedback":
            turns = [_user(_FEEDBACK.format(question=question, feedback=item.feedback))]
        elif self._template == "turn":
            first = question if item.context is None else f"{_CONTEXT.format(context=item.context)}{question}"
            turns = [_user(first), Message(role="assistant", content=item.demonstration or ""), _user(question)]
        elif self._user_template is None:
            turns = [_user(_paper(question, item.demonstration or "", item.context))]
        else:
            text = self._user_template.render(
                item.where,
                prompt=question,
                demonstration=item.demonstration,
                context=item.context,
                feedback=item.feedback,
                messages=messages,
            )
            if text.strip() == question.strip():
                raise UserError(
                    f"{self._template}: renders only the prompt for {item.where}, so teacher and student would see the "
                    f"same; put {{{{ {self._shown} }}}} into the template"
                )
            turns = [_user(text)]
        return self._encode([*earlier, *turns], item, whole=len(earlier) + 1 if self._template == "turn" else None)

    def demonstration(self, item: Record) -> list[int]:
        """Token ids of the demonstration as a reply to the student's prompt, with the tokens that end it."""
        end = self.end(item)
        ids: list[int] = self._tokenizer.encode(f"{item.demonstration or ''}{end.text}", add_special_tokens=False)
        return [*ids, end.token_id]

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of a reply, without the token that ends it and other special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def end(self, item: Record) -> ReplyEnd:
        """Return what ends a reply. It is found once, with the first `item`'s prompt, and is the same for all items."""
        if self._end is None:
            self._end = reply_end(
                self._tokenizer, lambda messages, opened: self._render(messages, item, opened), self._with_system(item)
            )
        return self._end

    def _with_system(self, item: Record) -> list[Message]:
        messages = list(item.messages)
        if self._system is not None and all(m["role"] != "system" for m in messages):
            messages.insert(0, Message(role="system", content=self._system))
        return messages

    def _encode(self, messages: list[Message], item: Record, whole: int | None = None) -> list[int]:
        """Render and tokenize `messages`. UserError if the template drops one. whole: index of the demonstration."""
        text = self._render(messages, item, opened=True)
        lost = left_out(text, messages, whole)
        if lost is not None:
            problem = _loss(lost, whole is not None and lost is messages[whole])
            raise UserError(f"{item.where}: {self._chat_template} {problem}")
        return [int(i) for i in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def _render(self, messages: list[Message], item: Record, opened: bool) -> str:
        """Render a conversation to text. opened: the text ends where the assistant's reply begins."""
        try:
            # A list of messages renders to one text.
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=opened,
                    strftime_now=self._now.strftime,  # overrides that of transformers, which reads the clock
                )
            )
        except Exception as e:  # noqa: BLE001 - a template is a program from the model: it can raise anything
            raise UserError(
                f"{item.where}: {self._chat_template} fails on these messages: {first_line(e)}; change the messages "
                f"or the template"
            ) from None


def _loss(lost: Message, demonstration: bool) -> str:
    """Describe, for an error message, how the chat template drops this message, and the fix."""
    if demonstration:
        return (
            "does not show the whole demonstration as an earlier turn (templates of reasoning models cut the reasoning "
            "there); set data.template: paper, which puts the demonstration into the user's turn"
        )
    if lost["role"] == "system":
        return "leaves out the system message; put its text into the first user message"
    return (
        f"does not show the {lost['role']}'s message unchanged; use a chat template that takes a message's content as "
        f"text and writes it unchanged"
    )


@dataclass(frozen=True)
class RecordContexts:
    """The texts and prompts of one record that are built while the run goes on (algorithms/base.py)."""

    builder: PromptBuilder
    record: Record
    limit: int  # data.max_teacher_prompt_tokens

    def teacher(self, **columns: str) -> IntArray:
        """Return the teacher's prompt [P], with these values in place of the record's columns."""
        changed: Any = columns  # text columns of Record
        ids = self.builder.teacher(replace(self.record, **changed))
        if ids is None:
            raise UserError(
                f"{self.record.where}: the teacher's prompt needs a column that this row lacks and that the algorithm "
                f"did not give; add the column to the row, or choose another data.template"
            )
        if len(ids) > self.limit:
            raise UserError(
                f"{self.record.where}: a teacher's prompt that was made during the run has {len(ids)} tokens, but "
                f"data.max_teacher_prompt_tokens is {self.limit}; raise it to at least {len(ids)}"
            )
        return np.asarray(ids, dtype=np.int32)

    def text(self, ids: IntArray) -> str:
        """Return the text of a completion [T], without the token that ends it."""
        return self.builder.text(ids.tolist())


def shown_to_teacher(template: str, base: Path) -> str | None:
    """Return the column that rows need for this template; None: only the prompt. UserError if the file is unusable."""
    if template in BUILT_IN_TEMPLATES:
        return BUILT_IN_TEMPLATES[template]
    return _user_template(template, base).shown


def _user_template(template: str, base: Path) -> UserTemplate:
    return UserTemplate(existing_file("data.template", template, base))


def build_prompts(
    builder: PromptBuilder,
    items: Sequence[Record],
    max_prompt_tokens: int,
    max_teacher_prompt_tokens: int,
    max_demonstration_tokens: int | None = None,
) -> list[PromptPair]:
    """Build the prompts of all items in order. Nothing is truncated: UserError lists the items that are too long.

    max_demonstration_tokens: None leaves demonstration_ids empty (None).
    """
    pairs: list[PromptPair] = []
    too_long: list[str] = []
    needed: dict[str, int] = {}
    for item in items:
        teacher_ids = builder.teacher(item)
        student_ids = builder.student(item)
        reply_ids = None if max_demonstration_tokens is None else builder.demonstration(item)
        pairs.append(PromptPair.of(student_ids, teacher_ids, reply_ids))
        for part, ids, key, limit in (
            ("prompt", student_ids, "data.max_prompt_tokens", max_prompt_tokens),
            ("teacher's prompt", teacher_ids or [], "data.max_teacher_prompt_tokens", max_teacher_prompt_tokens),
            ("demonstration", reply_ids or [], "sampling.max_new_tokens", max_demonstration_tokens or 0),
        ):
            if len(ids) > limit:
                too_long.append(f"{item.where}: the {part} has {len(ids)} tokens, but {key} is {limit}")
                needed[key] = max(len(ids), needed.get(key, 0))
    if too_long:
        if len(too_long) > MAX_REPORTED:
            too_long[MAX_REPORTED:] = [f"… and {len(too_long) - MAX_REPORTED} more"]
        mend = " and ".join(f"raise {key} to at least {tokens}" for key, tokens in needed.items())
        raise UserError("\n".join([*too_long, f"{mend}, or shorten these rows"]))
    return pairs


def check_ids(items: Sequence[Record], pairs: Sequence[PromptPair], rows: int | None) -> None:
    """UserError if a token id of a prompt or reply is not below `rows`, the model's embedding rows (None: unknown)."""
    if rows is None:
        return
    for item, pair in zip(items, pairs, strict=True):
        largest = max(int(ids.max(initial=0)) for ids in pair.parts if ids is not None)
        if largest >= rows:
            raise UserError(
                f"{item.where}: the tokenizer gives token {largest}, and the model's embedding has rows for tokens 0 "
                f"to {rows - 1} only; put the tokenizer that belongs to these weights into the model's folder"
            )


def text_prompts(tokenizer: "PreTrainedTokenizerBase", items: Sequence[Record], limit: int) -> list[PromptPair]:
    """Tokenize each text as it is, without a chat template. UserError unless it has 2 to `limit` tokens."""
    pairs = []
    for item in items:
        ids: list[int] = tokenizer(item.text).input_ids
        if not 2 <= len(ids) <= limit:
            raise UserError(
                f"{item.where}: the text has {len(ids)} tokens, and a text must have 2 to {limit} "
                f"(data.max_teacher_prompt_tokens); split the text, or join it with another"
            )
        pairs.append(PromptPair.of(ids, None))
    return pairs


def _user(content: str) -> Message:
    return Message(role="user", content=content)


def _paper(question: str, demonstration: str, context: str | None) -> str:
    heading = "" if context is None else _CONTEXT.format(context=context)
    return _PAPER.format(question=question, context=heading, demonstration=demonstration)
