"""Render the messages of a row with a model's chat template. What it leaves out, or fails on, is an error."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sdft.services.base.errors import UserError, first_line
from sdft.services.data.chat_template import left_out
from sdft.services.data.demonstrations import Record
from sdft.services.data.marks import marked
from sdft.services.data.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ChatTemplate:
    """The chat template of a tokenizer. `now` is the time for templates that write the date.

    UserError if the tokenizer has no usable chat template.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", now: datetime) -> None:
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
        self._tokenizer, self._now = tokenizer, now
        self.name = f"the chat template of the tokenizer in {tokenizer.name_or_path}"

    def text(self, messages: list[Message], item: Record, opened: bool, variables: Mapping[str, Any]) -> str:
        """Render a conversation, with the tools of `item`. opened: the text ends where the assistant's reply begins."""
        try:
            return self._text(messages, item, opened, variables)
        except Exception as e:  # noqa: BLE001 - a template is a program from the model: it can raise anything
            raise UserError(
                f"{item.where}: {self.name} fails on these messages: {first_line(e)}; "
                f"{self._mend(messages, item, opened, variables)}"
            ) from None

    def check_shown(
        self,
        text: str,
        messages: Sequence[Message],
        item: Record,
        variables: Mapping[str, Any],
        whole: int | None = None,
    ) -> None:
        """UserError if the rendered `text` lacks a message, a tool or a call. whole: index of the demonstration."""
        lost = left_out(text, messages, whole)
        if lost is not None:
            problem = _loss(lost, whole is not None and lost is messages[whole])
            raise UserError(f"{item.where}: {self.name} {problem}")
        marks = marked(messages, item.tools)
        if marks is None:
            return
        opened = messages[-1]["role"] != "assistant"
        unshown = marks.left_out(self.text(marks.messages, replace(item, tools=marks.tools), opened, variables))
        if unshown is not None:
            raise UserError(f"{item.where}: {self.name} leaves out {unshown}")

    def _text(self, messages: list[Message], item: Record, opened: bool, variables: Mapping[str, Any]) -> str:
        # A list of messages renders to one text.
        return str(
            self._tokenizer.apply_chat_template(
                messages,
                tools=item.tools,
                tokenize=False,
                add_generation_prompt=opened,
                strftime_now=self._now.strftime,  # overrides that of transformers, which reads the clock
                **variables,
            )
        )

    def _mend(self, messages: list[Message], item: Record, opened: bool, variables: Mapping[str, Any]) -> str:
        """Return what to do about messages that the chat template fails on."""
        without = [m for m in messages if m["role"] != "system"]
        if len(without) < len(messages):
            try:
                self._text(without, item, opened, variables)
                return "it takes no system message: put that text into the first user message, and set no data.system"
            except Exception:  # noqa: BLE001, S110 - the system message is not the reason
                pass
        settings = ", data.chat_template_kwargs" if variables else ""
        return f"change the messages{settings} or the template"


def _loss(lost: Message, demonstration: bool) -> str:
    """Describe, for an error message, how the chat template drops this message, and the fix."""
    if demonstration:
        return (
            "does not show the whole demonstration as an earlier turn (templates of reasoning models cut the reasoning "
            "there); set data.template: paper, which puts the demonstration into the user's turn"
        )
    if lost["role"] == "system":
        return "leaves out the system message; put its text into the first user message"
    if "tool_calls" in lost:
        return "leaves out the content of an assistant's message beside its tool_calls; remove the content there"
    return (
        f"does not show the {lost['role']}'s message unchanged; use a chat template that takes a message's content as "
        f"text and writes it unchanged"
    )
