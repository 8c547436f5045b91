"""Checks of a model's chat template: which messages it renders, where a reply begins, and what ends a reply.

A template is a program that comes with the model. It can drop or cut a message without an error.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from sdft.services.base.errors import UserError
from sdft.services.data.messages import Message
from sdft.services.data.thoughts import MARKS, parts, without_thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[list[Message], bool], str]  # messages, whether the assistant's turn is opened -> text
_CALL_AS_TEXT = "write the call as the text of the demonstration, or use another chat template"
REPLY = "sdft-reply"  # placeholder for a reply; it occurs in no template


@dataclass(frozen=True)
class ReplyEnd:
    """What the template appends to a reply."""

    text: str  # before the token that ends the reply; usually empty
    token_id: int  # the token that ends the reply: an engine stops at it
    behind: str = ""  # all that the template appends to the last reply of a conversation; it may lack the token


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


def reply_end(
    tokenizer: "PreTrainedTokenizerBase", render: Render, messages: list[Message], known: Collection[int]
) -> ReplyEnd:
    """Find what ends a reply to `messages`. known: tokens that the tokenizer and the model's files name as ends.

    The end is the first known token that the template puts behind every reply: other special tokens may come before it,
    as in Command R7B. If there is none, it is the first special token there. A template may put another end behind the
    last reply, as gpt-oss does, or none, as GLM 4, where the beginning of the next turn ends a reply. Without any
    special token it is the tokenizer's eos_token.

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
    if REPLY in answered:
        special = _special_tokens(tokenizer, known)
        ends = {token: i for token, i in special.items() if i in known}
        try:
            longer = render([*messages, reply, Message(role="user", content="Go on.")], False)
        except UserError:  # some templates refuse a conversation that goes on
            longer = answered
        going_on = longer.rpartition(REPLY)[2]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(behind, going_on, strict=False))
        of_turn = "".join(character for character, _ in same)  # without the end of the whole text, as in Phi 3
        for text in (of_turn, behind, going_on):
            found = _first(text, ends) or _first(text, special)
            if found is not None:
                return ReplyEnd(*found, behind)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model: no token ends a reply: the chat template of the tokenizer in {folder} appends no special token, "
            f"and the tokenizer has no eos_token; set eos_token in tokenizer_config.json"
        )
    return ReplyEnd("", int(tokenizer.eos_token_id), behind if REPLY in answered else "")


def reply_text(
    tokenizer: "PreTrainedTokenizerBase",
    reply: Message,
    prompt: str,
    whole: str,
    end: ReplyEnd,
    known: Collection[int],
) -> tuple[str, int]:
    """Return a reply as the template renders it behind the prompt, up to the token that ends it, and that token.

    prompt, whole: the rendered prompt, and the rendered prompt with the reply. end: what ends a reply without calls.
    known: as in reply_end(). If the template removes the reasoning of a reply without calls, the reply is returned as
    it is given, because the model writes its reasoning. ValueError, with the rest of a sentence about the template, if
    the reply is not the text that follows the prompt.
    """
    content, calls = reply["content"], "tool_calls" in reply
    follows = whole.startswith(prompt)
    written = whole[len(prompt) :]
    if calls and not follows:
        raise ValueError(f"does not write the demonstration, which has tool_calls, behind the prompt; {_CALL_AS_TEXT}")
    if follows and (calls or written.endswith(end.behind)):
        if written.endswith(end.behind) and (end.behind.strip() or not calls):
            text, token = written.removesuffix(end.behind) + end.text, end.token_id
        else:
            text, token = _end_of_calls(tokenizer, written, end.token_id, known)
        if _in_order(text, parts(content)):
            return text, token
        if calls or not _in_order(text, [without_thoughts(content).strip()]):
            raise ValueError("does not show the demonstration unchanged as a reply; change the demonstration")
    return _continued(content, prompt.rstrip(), prompt.endswith("\n")) + end.text, end.token_id


def _end_of_calls(
    tokenizer: "PreTrainedTokenizerBase", written: str, usual: int, known: Collection[int]
) -> tuple[str, int]:
    """Return a reply with calls up to the token that ends it, and that token. usual: what ends other replies.

    Calls may have an end of their own, as in gpt-oss. It must be one at which an engine stops.
    """
    ends = {usual, *known}
    special = _special_tokens(tokenizer, ends)
    body = written.rstrip()
    while last := next((token for token in special if body.endswith(token)), None):
        body = body.removesuffix(last).rstrip()
    behind = written[len(body) :]
    found = _first(behind, {token: i for token, i in special.items() if i in ends})
    if found is not None:
        return body + found[0], found[1]
    if behind.strip():
        raise ValueError(
            f"ends the demonstration, which has tool_calls, with {behind.strip()}, and other replies with "
            f"{tokenizer.convert_ids_to_tokens(usual)}, at which an engine stops; {_CALL_AS_TEXT}"
        )
    return body, usual


def _continued(demonstration: str, prompt: str, on_new_line: bool) -> str:
    """Return what of the demonstration follows a prompt that may begin or end the reasoning."""
    for begin, end in MARKS:
        if prompt.endswith(begin):
            if end not in demonstration:
                raise ValueError(
                    f"begins a reply with {begin}, and the demonstration has no {end}; put the reasoning and {end} "
                    f"before the answer in the demonstration, or set data.chat_template_kwargs so that no reasoning "
                    f"begins"
                )
            rest = demonstration.lstrip().removeprefix(begin)
            return rest.lstrip("\n") if on_new_line else rest
        if prompt.endswith(end) and begin in demonstration:
            raise ValueError(
                f"ends the reasoning before a reply begins, and the demonstration has {begin}; remove the reasoning "
                f"from the demonstration, or set data.chat_template_kwargs so that the model reasons"
            )
    return demonstration


def _in_order(text: str, pieces: Sequence[str]) -> bool:
    """Return whether `text` has all these pieces, one behind the other."""
    position = 0
    for piece in pieces:
        found = text.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return True


def _first(text: str, tokens: Mapping[str, int]) -> tuple[str, int] | None:
    """Return the text before the first of these tokens, and its id; the longest if several begin there."""
    found = [(text.find(token), -len(token), token) for token in tokens if token in text]
    if not found:
        return None
    at, _, token = min(found)
    return text[:at], tokens[token]


def _special_tokens(tokenizer: "PreTrainedTokenizerBase", known: Collection[int]) -> dict[str, int]:
    """Return the special tokens by their text, and the added tokens that are known ends, marked as special or not."""
    added = tokenizer.added_tokens_decoder.items()
    found = {token.content: i for i, token in added if token.special or i in known}
    named = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | {token: i for token, i in named if i is not None}
