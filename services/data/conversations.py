"""Logged conversations as rows: each reply that a user's message follows, what was before it, and that message.

user, reply, user, reply, user ─┬─► prompt: user              feedback: the first reply and the second message
                                └─► prompt: user, reply, user feedback: the second reply and the third message
"""

from collections.abc import Iterator
from typing import Any

from sdft.services.data.messages import Message, messages_of, said
from sdft.services.data.thoughts import without_thoughts

_ABOUT = "The response was:\n{reply}\n\nThis was said about it:\n{words}"


def about(reply: str, words: str) -> str:
    """Return the column feedback of a row: a reply, and what was said about it or next."""
    return _ABOUT.format(reply=reply, words=words)


def is_conversation(row: dict[str, Any]) -> bool:
    """Return whether a row in our columns is a log: messages, without a column that the teacher sees beside them."""
    prompt = row.get("prompt")
    messages = isinstance(prompt, list) and any(isinstance(message, dict) and "role" in message for message in prompt)
    return messages and row.get("feedback") is None and row.get("demonstration") is None


def answered(row: dict[str, Any], at: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a row for each reply of a conversation that a user's message follows, with the reply's number from 1.

    at: the column's name, for messages. Unusable says which message is wrong.
    """
    messages = messages_of(row["prompt"], at)
    for i in range(1, len(messages) - 1):
        if _is_answered(messages, i):
            feedback = about(without_thoughts(said(messages[i])).strip(), messages[i + 1]["content"])
            yield i + 1, row | {"prompt": messages[:i], "feedback": feedback}


def _is_answered(messages: list[Message], i: int) -> bool:
    before, own, behind = (messages[j]["role"] for j in (i - 1, i, i + 1))
    asked = before in ("user", "tool") and any(message["role"] == "user" for message in messages[:i])
    return asked and own == "assistant" and behind == "user"
