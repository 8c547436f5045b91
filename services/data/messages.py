"""Chat messages as they are read: roles, content as text or text parts, tool calls and their results."""

import json
from typing import Any, Literal, NotRequired, TypedDict

from sdft.services.data.rows import json_kind
from sdft.services.data.tools import calls_of
from sdft.services.data.values import EMPTY, Unusable, refuse_others, text_of

ROLES = ("system", "user", "assistant", "tool")
# Members of a message that are ignored (weight: whether the message is trained on; earlier messages never are).
# All others that no code here reads are refused: templates read reasoning_content, name and more.
HARMLESS = ("id", "message_id", "created", "created_at", "timestamp", "model", "metadata", "weight")


class Message(TypedDict):
    """One chat message."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str  # may be empty beside tool_calls, and in a tool's message
    tool_calls: NotRequired[list[dict[str, Any]]]  # of the assistant; the arguments of each are an object
    name: NotRequired[str]  # of the tool that sends the message
    tool_call_id: NotRequired[str]  # of the call that the tool's message answers


def said(message: Message) -> str:
    """Return a message as text: its content, then its calls as JSON, a line each."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    return "\n".join([*filter(None, [message["content"]]), *calls])


def messages_of(value: Any, at: str) -> list[Message]:
    """Return the messages of a prompt: given as text, as text parts, or as a list of messages."""
    parts = isinstance(value, list) and all(isinstance(v, dict) and "type" in v and "role" not in v for v in value)
    if value == []:
        raise Unusable(f"{at} is an empty list")
    if parts or not isinstance(value, list):
        return [Message(role="user", content=text_of(value, at, "text or a list of messages"))]
    return [message_of(message, f"{at} message {number}") for number, message in enumerate(value, start=1)]


def message_of(value: Any, at: str) -> Message:
    """Return a message that is given as an object. Unusable if it lacks something, or has what no code here reads."""
    if not isinstance(value, dict):
        raise Unusable(f"{at} must be an object with role and content, not {json_kind(value)}")
    role = value.get("role")
    if role not in ROLES:
        raise Unusable(f"{at}: role must be one of {', '.join(ROLES)}, not {role!r}")
    calls = value.get("tool_calls") if role == "assistant" else None
    content = value.get("content")
    if calls not in EMPTY and content is None:
        content = ""
    may_be_blank = role == "tool" or calls not in EMPTY
    message = Message(role=role, content=text_of(content, f"{at}: content", may_be_blank=may_be_blank))
    known = ["role", "content", *HARMLESS]
    if calls not in EMPTY:
        message["tool_calls"] = calls_of(calls, f"{at}: tool_calls")
        known.append("tool_calls")
    if role == "tool":
        known += ["name", "tool_call_id"]
        if value.get("name") not in EMPTY:
            message["name"] = text_of(value["name"], f"{at}: name")
        if value.get("tool_call_id") not in EMPTY:
            message["tool_call_id"] = text_of(value["tool_call_id"], f"{at}: tool_call_id")
    refuse_others(value, known, at, "only role and content are; write it into the content, or remove it")
    return message
