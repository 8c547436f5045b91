"""The two contexts of a demonstration as token ids: the student sees the prompt, the teacher the demonstration too."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file
from sdft.services.data.demonstrations import Message, Record
from sdft.services.data.templates import UserTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
from sdft.services.config.templates import BUILT_IN_TEMPLATES

MAX_REPORTED = 20
# The wording of the SDFT paper (arXiv 2601.19897); the context, which the paper has no words for, stands before it.
_CONTEXT = "This is background for the question:\n{context}\n\n"
_PAPER = (
    "{question}\n\n{context}This is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
# As in self-distilled policy optimisation: what was said of an attempt stands in the place of an example.
_FEEDBACK = (
    "{question}\n\nThis is feedback on an earlier response to the question:\n{feedback}\n\n"
    "Now answer with a response of your own that needs no such feedback."
)


@dataclass(frozen=True)
class PromptPair:
    """Token ids of one record's contexts, both ending where the assistant's reply begins."""

    student_ids: list[int]
    teacher_ids: list[int] | None  # None: the record has nothing to show to a teacher
    demonstration_ids: list[int] | None = None  # as a reply, with the token that ends it


class PromptBuilder:
    """Turns records into prompts with a tokenizer's chat template and a teacher template.

    `template` is "paper" (the last user message holds the example), "turn" (the demonstration is an earlier assistant
    turn), "context" (the background alone), "feedback" (what was said of an attempt), "none" (the teacher sees what the
    student sees), or the path of a Jinja template, relative to the folder `base`, whose output is the teacher's last
    user message. `system` is put before records that bring no system message. `now` is the time that a chat template
    may write; None: that of this call.
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
                "its chat_template.jinja into the folder"
            )
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        self._now = now or datetime.now()
        self._user_template = None if template in BUILT_IN_TEMPLATES else _user_template(template, base)
        self._shown = self._user_template.shown if self._user_template else BUILT_IN_TEMPLATES[template]

    def student(self, item: Record) -> list[int]:
        """Token ids of the prompt alone."""
        return self._encode(self._with_system(item), item)

    def teacher(self, item: Record) -> list[int] | None:
        """Token ids of the prompt with what the template shows; None if the record does not have that."""
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
            turns = [_user(text)]
        return self._encode([*earlier, *turns], item)

    def demonstration(self, item: Record) -> list[int]:
        """Token ids of the demonstration as a reply behind the student's prompt, with the token that ends it."""
        ids: list[int] = self._tokenizer.encode(item.demonstration or "", add_special_tokens=False)
        return [*ids, self._tokenizer.eos_token_id]

    def _with_system(self, item: Record) -> list[Message]:
        messages = list(item.messages)
        if self._system is not None and all(m["role"] != "system" for m in messages):
            messages.insert(0, Message(role="system", content=self._system))
        return messages

    def _encode(self, messages: list[Message], item: Record) -> list[int]:
        from jinja2 import TemplateError

        try:
            # return_dict=False: the default is a BatchEncoding, whose length is its number of keys.
            ids: Any = self._tokenizer.apply_chat_template(
                messages,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
                strftime_now=self._now.strftime,  # in the place of transformers' own, which reads the clock
            )
        except TemplateError as e:
            raise UserError(f"{item.where}: the model's chat template refuses these messages: {e}") from None
        return [int(i) for i in ids]


def shown_to_teacher(template: str, base: Path) -> str | None:
    """The column that rows must have for this template; None: the prompt alone. A UserError if there is no such one."""
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
    """The prompts of all items in order; nothing is cut: a UserError lists the items whose prompts are too long.

    max_demonstration_tokens: None leaves out the demonstrations as replies.
    """
    pairs: list[PromptPair] = []
    too_long: list[str] = []
    needed: dict[str, int] = {}
    for item in items:
        teacher_ids = builder.teacher(item)
        reply_ids = None if max_demonstration_tokens is None else builder.demonstration(item)
        pairs.append(PromptPair(builder.student(item), teacher_ids, reply_ids))
        for who, ids, key, limit in (
            ("prompt", pairs[-1].student_ids, "data.max_prompt_tokens", max_prompt_tokens),
            ("teacher's prompt", teacher_ids or [], "data.max_teacher_prompt_tokens", max_teacher_prompt_tokens),
            ("demonstration", reply_ids or [], "sampling.max_new_tokens", max_demonstration_tokens or 0),
        ):
            if len(ids) > limit:
                too_long.append(f"{item.where}: the {who} has {len(ids)} tokens, {key} is {limit}")
                needed[key] = max(len(ids), needed.get(key, 0))
    if too_long:
        if len(too_long) > MAX_REPORTED:
            too_long[MAX_REPORTED:] = [f"… and {len(too_long) - MAX_REPORTED} more"]
        mend = " and ".join(f"raise {key} to at least {tokens}" for key, tokens in needed.items())
        raise UserError("\n".join([*too_long, f"{mend}, or shorten these rows"]))
    return pairs


def text_prompts(tokenizer: "PreTrainedTokenizerBase", items: Sequence[Record], limit: int) -> list[PromptPair]:
    """The ids of each text as it is, outside of any chat; a UserError if one is longer than the engines take."""
    pairs = []
    for item in items:
        ids: list[int] = tokenizer(item.text).input_ids
        if not 2 <= len(ids) <= limit:
            raise UserError(
                f"{item.where}: the text has {len(ids)} tokens; from 2 to data.max_teacher_prompt_tokens, {limit}, can "
                f"be scored; cut it into shorter ones, or join it with others"
            )
        pairs.append(PromptPair(ids, None))
    return pairs


def _user(content: str) -> Message:
    return Message(role="user", content=content)


def _paper(question: str, demonstration: str, context: str | None) -> str:
    heading = "" if context is None else _CONTEXT.format(context=context)
    return _PAPER.format(question=question, context=heading, demonstration=demonstration)
