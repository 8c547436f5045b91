"""Tools and calls in prompts: what the chat template writes is trained, and what it leaves out is refused."""

from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.prompts import build_prompts
from sdft.services.data.record_contexts import RecordContexts
from sdft.services.data.tokenizer import load_tokenizer
from tests.fakes.tiny import TEMPLATE, WITH_TOOLS

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
CALL = Message(
    role="assistant",
    content="",
    tool_calls=[{"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}],
)
HISTORY = (Message(role="user", content="Please look: dry?"), CALL, Message(role="tool", content='{"sky": "rain"}'))
SHOWN_CALL = '<call>{"name": "look", "arguments": {"at": "the sky"}}</call>'
SHOWN_TOOLS = (
    '<|im_start|>system\n{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}\n'
)


def record(*messages: Message, demonstration: str | Message = "No.", tools: Any = TOOLS) -> Record:
    return Record("a", messages, demonstration, None, None, None, "train.jsonl:7", tools=tools)


def builder(model: Path, chat_template: str, template: str = "paper") -> PromptBuilder:
    tokenizer: Any = load_tokenizer(model)
    tokenizer.chat_template = chat_template
    return PromptBuilder(tokenizer, template, model, None)


def texts(one: PromptBuilder, item: Record) -> list[str]:
    """Return the text of the student's and the teacher's prompt, and of the demonstration."""
    (pair,) = build_prompts(one, [item], 1000, 2000, 500)
    return [str(load_any(one).decode(ids)) for ids in pair.parts]


def load_any(one: Any) -> Any:
    return one._tokenizer


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


@pytest.mark.parametrize("template", ["paper", "turn", "none"])
def test_tools_and_history_are_in_both_prompts(tiny_model: Path, template: str) -> None:
    """The last message of the user is changed for the teacher; the call and its result stay behind it."""
    student, teacher, demonstration = texts(builder(tiny_model, WITH_TOOLS, template), record(*HISTORY))
    behind = turn("assistant", SHOWN_CALL) + turn("tool", '{"sky": "rain"}')
    asked = turn("user", "Please look: dry?")
    opened = "<|im_start|>assistant\n"
    assert student.endswith(f"<|im_end|>\n{asked}{behind}{opened}")
    assert student.startswith(SHOWN_TOOLS)
    assert teacher.startswith(SHOWN_TOOLS)
    if template == "turn":
        assert teacher.endswith(asked + behind + turn("assistant", "No.") + asked + behind + opened)
    elif template == "paper":
        assert teacher.endswith(f"including the thinking process.<|im_end|>\n{behind}{opened}")
        assert teacher.count(SHOWN_CALL) == 1
    else:
        assert teacher == student
    assert demonstration == "No.<|im_end|>"


@pytest.mark.parametrize("template", ["paper", "turn"])
def test_a_call_is_trained_as_the_chat_template_writes_it(tiny_model: Path, template: str) -> None:
    one = builder(tiny_model, WITH_TOOLS, template)
    item = record(Message(role="user", content="Dry?"), demonstration=CALL)
    student, teacher, demonstration = texts(one, item)
    assert demonstration == f"{SHOWN_CALL}<|im_end|>"
    rendered = load_any(one).apply_chat_template([*item.messages, CALL], tools=TOOLS, tokenize=False)
    assert rendered == f"{student}{demonstration}\n"
    assert SHOWN_CALL in teacher
    ids = RecordContexts(one, item, 2000).teacher(demonstration="Another.")  # as an algorithm replaces it
    assert SHOWN_CALL not in load_any(one).decode(ids)


@pytest.mark.parametrize(
    ("chat_template", "item", "expected"),
    [
        (TEMPLATE, record(Message(role="user", content="look")), "leaves out the tool look of the column tools"),
        (TEMPLATE, record(*HISTORY, tools=None), "leaves out a call of look in tool_calls"),
        (
            WITH_TOOLS.replace("{{ c['function'] | tojson }}", "{{ c['function']['name'] }}"),
            record(*HISTORY),
            "leaves out the arguments of a call of look",
        ),
        # The name stands in the definition, but not as a call.
        (WITH_TOOLS.replace("m['tool_calls']", "[]"), record(*HISTORY), "leaves out a call of look"),
        (
            WITH_TOOLS.replace("m['tool_calls']", "[]"),
            record(HISTORY[0], demonstration=CALL),
            "leaves out a call of look",
        ),
        (
            WITH_TOOLS.replace("{{ m['content'] }}", "{{ m['content'] if not m['tool_calls'] }}"),
            record(HISTORY[0], CALL | Message(role="assistant", content="So."), HISTORY[2]),
            "leaves out the content of an assistant's message beside its tool_calls",
        ),
        (
            WITH_TOOLS.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>{% endif %}"),
            record(HISTORY[0], demonstration=CALL),
            "does not write the demonstration, which has tool_calls, behind the prompt",
        ),
        (
            WITH_TOOLS.replace(
                "<|im_end|>\n{% endfor %}", "<|{{ 'endoftext' if m['tool_calls'] else 'im_end' }}|>{% endfor %}"
            ),
            record(HISTORY[0], demonstration=CALL),
            r"ends the demonstration, which has tool_calls, with <\|endoftext\|>, and other replies with <\|im_end\|>",
        ),
        # Trimmed, an empty reply does not begin with the prompt, but what is left out comes first.
        (
            TEMPLATE.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }}"),
            record(HISTORY[0], demonstration=CALL),
            "leaves out the tool look",
        ),
        ("{{ raise_exception('one call only') }}", record(*HISTORY), "fails on these messages: one call only"),
    ],
)
def test_what_a_chat_template_leaves_out_is_refused(
    tiny_model: Path, chat_template: str, item: Record, expected: str
) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl:7: the chat template of the tokenizer in .* {expected}"):
        build_prompts(builder(tiny_model, chat_template), [item], 1000, 2000, 500)


def test_a_tools_result_may_be_written_as_a_json_text(tiny_model: Path) -> None:
    """As in Llama 3.1's template."""
    quoted = WITH_TOOLS.replace(
        "{{ m['content'] }}", "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}"
    )
    student, *_ = texts(builder(tiny_model, quoted), record(*HISTORY))
    assert r'"{\"sky\": \"rain\"}"' in student
