"""What becomes of a comment on an answer: a record whose teacher sees the comment, or a count.

answer, comment ─► row with the column feedback ─► window, where the teacher's prompt is of the template feedback
"""

import json
from pathlib import Path
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.contexts import shown_to_teacher
from sdft.services.data.conversations import about
from sdft.services.serving.receipts import Receipt

TEMPLATE = "feedback"
KEYS = {"comment": "comments", "next_message": "next_messages"}  # kind of feedback -> its setting


def trained_kinds(config: RunConfig) -> frozenset[str]:
    """Return the kinds of feedback that become records without a demonstration. UserError for an impossible setting.

    config: of the service, with absolute paths.
    """
    assert config.service is not None
    set_to = {kind: getattr(config.service.feedback, key) for kind, key in KEYS.items()}
    why = _impossible(config)
    for kind, value in set_to.items():
        if value == "trained" and why is not None:
            raise UserError(f"service.feedback.{KEYS[kind]}: trained is impossible, because {why}; set counted")
    if config.method.from_conversations and set_to["next_message"] == "counted":
        raise UserError(
            f"service.feedback.next_messages: counted leaves out what method {config.method.type} learns from; set "
            f"trained, or method: sdft"
        )
    trained = {kind for kind, value in set_to.items() if value == "trained"}
    if set_to["comment"] is None and why is None:
        trained.add("comment")
    if set_to["next_message"] is None and why is None and config.method.from_conversations:
        trained.add("next_message")
    return frozenset(trained)


def template_added(config: RunConfig) -> str | None:
    """Return the value of data.fallback_template that a window needs for comments; None: what is set is enough."""
    assert config.data is not None
    if not trained_kinds(config) or shown_to_teacher(config.data, Path("/")) == TEMPLATE:
        return None
    return TEMPLATE


def row_of(receipt: Receipt, said: str) -> dict[str, Any]:
    """Return the record of what was said about an answer. receipt.messages must not be None."""
    calls = receipt.answer.get("tool_calls") or ()
    shown = [str(receipt.answer.get("content") or ""), *(json.dumps(c["function"], ensure_ascii=False) for c in calls)]
    row = {"prompt": receipt.messages, "feedback": about("\n".join(filter(None, shown)), said)}
    return row | ({"tools": receipt.tools} if receipt.tools else {})


def _impossible(config: RunConfig) -> str | None:
    """Return why no record without a demonstration can be trained."""
    assert config.data is not None
    if config.method.trains_demonstrations:
        return f"method {config.method.type} trains demonstrations, and no teacher sees a comment"
    if config.data.template == "none":
        return "data.template none shows the teacher the prompt alone"
    if config.data.fallback_template not in (None, TEMPLATE):
        return f"data.fallback_template is {config.data.fallback_template}"
    return None
