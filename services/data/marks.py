"""Marks in place of the names of tools and calls and of arguments, to see whether a chat template writes them.

A name may stand elsewhere in a prompt, as that of a tool in the user's question, so that the prompt itself does not
show what the template left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdft.services.data.messages import Message
from sdft.services.data.tools import function_of

_TOOL = "the tool {} of the column tools; describe the tool in the system message and remove the column"
_CALL = "a call of {} in tool_calls; write the call as the content of the message and remove tool_calls"
_ARGUMENTS = f"the arguments of {_CALL}"
_OTHERWISE = ", or use a chat template that writes tools and calls"


@dataclass(frozen=True)
class Marked:
    """Messages and tools with marks, and what each mark stands for, with the mend."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None
    meaning: dict[str, str]

    def left_out(self, text: str) -> str | None:
        """Return what a text that is rendered of them lacks, with the mend; None if it has all marks."""
        return next((words + _OTHERWISE for mark, words in self.meaning.items() if mark not in text), None)


def marked(messages: Sequence[Message], tools: list[dict[str, Any]] | None) -> Marked | None:
    """Return messages and tools with marks; None if they have neither tools nor calls."""
    meaning: dict[str, str] = {}

    def mark(words: str, function: dict[str, Any]) -> str:
        name = f"sdft_{len(meaning)}_mark"  # a name as tools have; none is part of another
        meaning[name] = words.format(function["name"])
        return name

    def renamed(given: dict[str, Any], words: str) -> dict[str, Any]:
        function = function_of(given)
        changed = function | {"name": mark(words, function)}
        if words is _CALL and function["arguments"]:
            changed["arguments"] = {"argument": mark(_ARGUMENTS, function)}
        return changed if function is given else given | {"function": changed}

    def with_marks(message: Message) -> Message:
        if "tool_calls" not in message:
            return message
        changed = message.copy()
        changed["tool_calls"] = [renamed(call, _CALL) for call in message["tool_calls"]]
        return changed

    of_tools = None if tools is None else [renamed(tool, _TOOL) for tool in tools]
    of_messages = [with_marks(message) for message in messages]
    return Marked(of_messages, of_tools, meaning) if meaning else None
