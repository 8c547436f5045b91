"""Checks of a model's chat template: which messages it renders, where a reply begins, and what ends a reply.

A template is a program that comes with the model. It can drop or cut a message without an error.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sdft.services.base.errors import UserError
from sdft.services.data.messages import Message
from sdft.services.data.thoughts import without_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[list[Message], bool], str]  # messages, whether the assistant's turn is opened -> text
REPLY = "sdft-reply"  # placeholder for a reply; it occurs in no template


@dataclass(frozen=True)
class ReplyEnd:
    """What the template appends to a reply: text (usually empty) and the token at which an engine stops."""

    text: str
    token_id: int


def left_out(text: str, messages: Sequence[Message], whole: int | None = None) -> Message | None:
    """Return the first message whose content the rendered `text` lacks or has out of order; None if all are there.

    White space around a content is ignored, because many templates trim it. A system message may occur anywhere,
    because some templates put it into a user's turn. The reasoning of an assistant's turn may be missing, because
    templates of reasoning models remove it from earlier turns; the message with index `whole` must keep it.
    """
    position = 0
    for i, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "assistant" and i != whole:
            content = without_thoughts(content)
        content = content.strip()
        found = text.find(content, 0 if message["role"] == "system" else position)
        if found < 0 and message["role"] == "tool":  # some templates write a tool's result as a JSON text
            content = json.dumps(content, ensure_ascii=False)[1:-1]
            found = text.find(content, position)
        if found < 0:
            return message
        if message["role"] != "system":
            position = found + len(content)
    return None


def reply_end(tokenizer: "PreTrainedTokenizerBase", render: Render, messages: list[Message]) -> ReplyEnd:
    """Find what ends a reply to `messages`.

    The end is the tokenizer's eos_token if the template puts it after a reply; else the first special token after the
    reply, in its own turn or, in templates that do not end a turn, in the next turn; else eos_token.

    UserError if the prompt does not end where a reply begins, or if no token would stop an engine.
    """
    folder = tokenizer.name_or_path
    reply = Message(role="assistant", content=REPLY)
    answered = render([*messages, reply], False)
    before, _, behind = answered.rpartition(REPLY)
    prompt = render(messages, True)
    if prompt == render(messages, False) and before.rstrip() != prompt.rstrip():
        raise UserError(
            f"model: the chat template of the tokenizer in {folder} ignores add_generation_prompt: a prompt would end "
            f"before the assistant's turn begins; end the template with {{% if add_generation_prompt %}} and the "
            f"beginning of that turn"
        )
    special = _special_tokens(tokenizer)
    if REPLY in answered:
        _, _, next_turn = render([*messages, reply, Message(role="user", content="Go on.")], False).rpartition(REPLY)
        eos = tokenizer.eos_token
        if eos in special and eos in behind:  # other special tokens may come before it, as in Command R7B
            return ReplyEnd(behind[: behind.find(eos)], special[eos])
        for tail in (behind, next_turn):
            found = [(tail.find(token), -len(token), token) for token in special if token in tail]
            if found:  # the earliest; the longest if several begin there
                at, _, token = min(found)
                return ReplyEnd(tail[:at], special[token])
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model: no token ends a reply: the chat template of the tokenizer in {folder} appends no special token, "
            f"and the tokenizer has no eos_token; set eos_token in tokenizer_config.json"
        )
    return ReplyEnd("", int(tokenizer.eos_token_id))


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    found = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | {token: i for token, i in known if i is not None}
