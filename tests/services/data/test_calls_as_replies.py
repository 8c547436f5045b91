"""A demonstration with tool calls is trained as the chat template renders it, with tools, variables and reasoning."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.tokenizer import load_tokenizer
from tests.fakes.chat import FAMILIES, QWEN_TOOLS, make_chat_model
from tests.fakes.spoiling import Work

CALLS = [{"type": "function", "function": {"name": "look", "arguments": {"at": "the sky"}}}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
SHOWN = '<tool_call>{"name": "look", "arguments": {"at": "the sky"}}</tool_call>'
NO_THOUGHT = "<think>\n\n</think>\n\n"
OFF = {"enable_thinking": False}


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reasoning model whose chat template writes tools and calls."""
    family = replace(FAMILIES["qwen"], template=QWEN_TOOLS)
    return make_chat_model(tmp_path_factory.mktemp("calls") / "m", tiny_model, family)


def record(content: str = "", calls: list[dict[str, Any]] = CALLS) -> Record:
    asked = (Message(role="user", content="Is it dry?"),)
    call = Message(role="assistant", content=content, tool_calls=calls)
    return Record("a", asked, call, None, None, None, "train.jsonl:7", tools=TOOLS)


def builder(model: Path, variables: Mapping[str, Any] = OFF, template: str = "paper") -> Any:
    return PromptBuilder(load_tokenizer(model), template, Path("."), None, None, variables)


def changed(model: Path, old: str, new: str) -> Any:
    one = builder(model, {})
    assert old in QWEN_TOOLS
    one._tokenizer.chat_template = QWEN_TOOLS.replace(old, new)
    return one


@pytest.mark.parametrize("variables", [{}, OFF])
@pytest.mark.parametrize("content", ["", "I look.", "<think>\nThe sea is near.\n</think>\n\nI look."])
def test_prompt_and_calls_are_what_the_template_renders(
    model: Path, content: str, variables: Mapping[str, Any]
) -> None:
    one, item = builder(model, variables), record(content)
    if content.startswith("<think>") and variables:  # the prompt has ended the reasoning
        with pytest.raises(UserError, match=r"train\.jsonl:7: .*does not write the demonstration.*behind the prompt"):
            one.demonstration(item)
        return
    messages = [*item.messages, item.demonstration]
    whole = one._tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=True, return_dict=False, **variables)
    assert one.student(item) + one.demonstration(item) == whole[: whole.index(2, len(one.student(item))) + 1]
    assert one._tokenizer.decode(one.demonstration(item)).endswith(f"{SHOWN}<|im_end|>")
    assert one.length(item) > len(SHOWN) // 8


def test_the_teachers_example_is_the_call_without_the_empty_reasoning(model: Path) -> None:
    for one in (builder(model), builder(model, {})):
        assert f"question:\n{SHOWN}\n\nNow" in one._tokenizer.decode(one.teacher(record()))
    thought = "<think>\nThe sea is near.\n</think>\n\nI look."
    shown = builder(model, {})
    assert f"question:\n{thought}{SHOWN}\n\nNow" in shown._tokenizer.decode(shown.teacher(record(thought)))


def test_calls_may_have_an_end_of_their_own_at_which_engines_stop(model: Path) -> None:
    """As in gpt-oss: the model's files name both ends."""
    own = "'<|endoftext|>' if m.tool_calls else '<|im_end|>\\n'"
    one = changed(model, "'<|im_end|>\\n' }}\n{%- endfor", f"({own}) }}}}\n{{%- endfor")
    ids = one.demonstration(record())
    assert one._tokenizer.decode(ids) == f"{NO_THOUGHT}{SHOWN}<|endoftext|>"
    assert ids[-1] == 0
    assert one.stop_ids(record()) == (2, 0)
    assert one.demonstration(replace(record(), demonstration="No."))[-1] == 2


def test_without_an_end_behind_calls_they_end_as_other_replies(model: Path) -> None:
    own = "'\\n' if m.tool_calls else '<|im_end|>\\n'"
    one = changed(model, "'<|im_end|>\\n' }}\n{%- endfor", f"({own}) }}}}\n{{%- endfor")
    assert one._tokenizer.decode(one.demonstration(record())) == f"{NO_THOUGHT}{SHOWN}<|im_end|>"


def test_an_end_in_the_arguments_is_refused(model: Path) -> None:
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "<|im_end|>"}}}]
    with pytest.raises(UserError, match=r"train\.jsonl:7: the demonstration has <\|im_end\|>, which ends a reply"):
        changed(model, "| tojson", "| string").demonstration(record(calls=calls))


def test_reasoning_beside_calls_that_the_template_removes_is_refused(model: Path) -> None:
    one = changed(model, "reasoning.strip('\\n')", "''")
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*does not show the demonstration unchanged as a reply"):
        one.demonstration(record("<think>The sea is near.</think>I look."))


@pytest.mark.usefixtures("unexamined")
def test_show_prints_tools_calls_and_variables(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    work = Work(tmp_path, model)
    asked = [{"role": "user", "content": [{"type": "text", "text": "Is it dry?"}]}]
    row = {"tools": TOOLS, "messages": [*asked, {"role": "assistant", "tool_calls": CALLS}]}
    work.rows("train.jsonl", row, row)
    for key, value in (
        ("data.template", "turn"),
        ("data.columns", {"prompt": "messages"}),
        ("data.max_prompt_tokens", 300),
        ("data.max_teacher_prompt_tokens", 400),
        ("data.chat_template_kwargs", {"student": OFF}),
        ("sampling.max_new_tokens", 90),
    ):
        work.set(key, value)
    work.save()
    opened, tools = "<|im_start|>assistant\n", '{"type": "function", "function": {"name": "look", "parameters": '

    def parts(method: str) -> list[str]:
        """Return what is shown of the first row: the contexts of student and teacher, and the reply."""
        assert main(["check", str(tmp_path / "my.yaml"), "--show", "1", "--set", f"method={method}"]) == 0
        return capsys.readouterr().out.split("\n── ")[-3:]

    for method in ("sft", "sdft"):
        student, teacher, reply = parts(method)
        assert tools in student
        assert student.endswith(f"user\nIs it dry?<|im_end|>\n{opened}{NO_THOUGHT}")
        shown = reply.partition(":\n")[2]
        if method == "sft":
            assert teacher.startswith("teacher's context: none")
            assert shown == f"⟦{SHOWN}<|im_end|>⟧\n"
        else:
            assert tools in teacher
            assert f"{opened}{SHOWN}<|im_end|>\n" in teacher
            assert teacher.endswith(f"user\nIs it dry?<|im_end|>\n{opened}")
            assert shown.replace("⟦", "").replace("⟧", "") == f"{SHOWN}<|im_end|>\n"


@pytest.mark.usefixtures("unexamined")
def test_show_says_why_a_demonstration_is_no_reply(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt of R1 begins the reasoning. A teacher can be shown a demonstration without it."""
    work = Work(tmp_path, make_chat_model(tmp_path / "r1", tiny_model, FAMILIES["r1"]))
    work.set("data.max_prompt_tokens", 200)
    work.set("data.max_teacher_prompt_tokens", 400)
    work.save()
    assert main(["check", str(tmp_path / "my.yaml"), "--show", "1"]) == 0
    *_, heading, why = capsys.readouterr().out.splitlines()
    assert heading.startswith("── reply: sampled during the run;")
    assert "the demonstration cannot take its place" in why
    assert "train.jsonl:1: " in why
    assert "has no </think>" in why
