"""Prompts: what student and teacher see with each template, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.data.contexts import PromptBuilder, shown_to_teacher
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.prompts import build_prompts
from sdft.services.data.tokenizer import load_tokenizer


def item(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "id": "a",
        "messages": (Message(role="user", content="Why {x}?"),),
        "demonstration": "Because {{ y }}.",
        "context": None,
        "feedback": None,
        "answer": None,
        "where": "train.jsonl:7",
    }
    return Record(**fields | changes)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def turns(*pairs: tuple[str, str]) -> str:
    """Return the turns in the tiny model's chat format, followed by the start of a reply."""
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in pairs)
    return f"{said}<|im_start|>assistant\n"


def teacher_text(tokenizer: Any, template: str, it: Record, base: Path, system: str | None = None) -> str:
    ids = PromptBuilder(tokenizer, template, base, system).teacher(it)
    assert type(ids) is list
    assert all(type(i) is int for i in ids)
    return str(tokenizer.decode(ids))


def test_the_student_sees_the_prompt_alone(tokenizer: Any, tmp_path: Path) -> None:
    ids = PromptBuilder(tokenizer, "paper", tmp_path, None).student(item(context="C"))
    assert type(ids) is list
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == turns(("user", "Why {x}?"))


def test_a_demonstration_as_a_reply_ends_with_the_token_that_ends_a_reply(tokenizer: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(tokenizer, "paper", tmp_path, None)
    (pair,) = build_prompts(builder, [item()], 100, 200, 50)
    assert pair.demonstration_ids is not None
    assert tokenizer.decode([*pair.student_ids, *pair.demonstration_ids]) == turns(("user", "Why {x}?")) + (
        "Because {{ y }}." + tokenizer.eos_token
    )
    with pytest.raises(
        UserError, match=r"train.jsonl:7: the demonstration has \d+ tokens, but sampling.max_new_tokens is 3"
    ):
        build_prompts(builder, [item()], 100, 200, 3)


def test_the_paper_template_has_the_papers_words(tokenizer: Any, tmp_path: Path) -> None:
    assert teacher_text(tokenizer, "paper", item(), tmp_path) == turns(
        (
            "user",
            "Why {x}?\n\nThis is an example for a response to the question:\nBecause {{ y }}.\n\n"
            "Now answer with a response of your own, including the thinking process.",
        )
    )


def test_the_paper_template_puts_the_context_before_the_example(tokenizer: Any, tmp_path: Path) -> None:
    text = teacher_text(tokenizer, "paper", item(context="An {article}."), tmp_path)
    assert text.index("Why {x}?") < text.index(":\nAn {article}.\n\n") < text.index("This is an example")


def test_the_turn_template_has_the_demonstration_as_an_earlier_turn(tokenizer: Any, tmp_path: Path) -> None:
    expected = turns(("user", "Why {x}?"), ("assistant", "Because {{ y }}."), ("user", "Why {x}?"))
    assert teacher_text(tokenizer, "turn", item(), tmp_path) == expected
    with_context = teacher_text(tokenizer, "turn", item(context="An article."), tmp_path)
    assert with_context.count("An article.") == 1
    assert with_context.index("An article.") < with_context.index("Why {x}?")


def test_the_context_and_feedback_templates_show_the_column_of_their_name(tokenizer: Any, tmp_path: Path) -> None:
    """If a record lacks the column of a template, there is no teacher prompt."""
    bare = item(demonstration=None)
    told = item(demonstration=None, context="A {fact}.", feedback="Too {long}.")
    context, feedback = (teacher_text(tokenizer, name, told, tmp_path) for name in ("context", "feedback"))
    assert context == turns(("user", "This is background for the question:\nA {fact}.\n\nWhy {x}?"))
    assert feedback.index("Why {x}?") < feedback.index("This is feedback on an earlier response")
    assert "\nToo {long}.\n" in feedback
    for name in ("paper", "turn", "context", "feedback"):
        assert PromptBuilder(tokenizer, name, tmp_path, None).teacher(bare) is None
    none = PromptBuilder(tokenizer, "none", tmp_path, None)
    assert none.teacher(told) == none.student(told)


@pytest.mark.parametrize(
    ("template", "column"),
    [("paper", "demonstration"), ("feedback", "feedback"), ("none", None), ("t.jinja", "context")],
)
def test_a_template_says_which_column_it_needs(tmp_path: Path, template: str, column: str | None) -> None:
    (tmp_path / "t.jinja").write_text("{{ context }} {{ prompt }}")
    assert shown_to_teacher(DataConfig(train="t.jsonl", template=template), tmp_path) == column


def test_a_record_without_the_column_is_shown_with_the_fallback(tokenizer: Any, tmp_path: Path) -> None:
    both = PromptBuilder(tokenizer, "turn", tmp_path, None, fallback="feedback")
    said = item(demonstration=None, feedback="Too long.")
    assert both.teacher(said) == PromptBuilder(tokenizer, "feedback", tmp_path, None).teacher(said)
    shown = item(demonstration="So.", feedback="Too long.")
    assert both.teacher(shown) == PromptBuilder(tokenizer, "turn", tmp_path, None).teacher(shown)
    assert both.teacher(item(demonstration=None)) is None
    data = DataConfig(train="t.jsonl", template="turn", fallback_template="feedback")
    assert shown_to_teacher(data, tmp_path) == "demonstration|feedback"


def test_a_fallback_that_shows_the_same_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{{ feedback }} {{ prompt }}")
    with pytest.raises(UserError, match=r"fallback_template feedback has no effect: t\.jinja shows feedback, too"):
        shown_to_teacher(DataConfig(train="t.jsonl", template="t.jinja", fallback_template="feedback"), tmp_path)
    with pytest.raises(ValueError, match="fallback_template context has no effect with template context"):
        DataConfig(train="t.jsonl", template="context", fallback_template="context")


@pytest.mark.parametrize("template", ["paper", "turn"])
def test_system_and_earlier_turns_stay(tokenizer: Any, tmp_path: Path, template: str) -> None:
    messages = (
        Message(role="system", content="S"),
        Message(role="user", content="first"),
        Message(role="assistant", content="reply"),
        Message(role="user", content="last"),
    )
    text = teacher_text(tokenizer, template, item(messages=messages), tmp_path, system="another")
    start = turns(("system", "S"), ("user", "first"), ("assistant", "reply")).removesuffix("<|im_start|>assistant\n")
    assert text.startswith(start + "<|im_start|>user\nlast")
    assert "another" not in text


def test_the_configured_system_message_goes_to_both(tokenizer: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(tokenizer, "turn", tmp_path, "Be brief.")
    for ids in (builder.student(item()), builder.teacher(item())):
        assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_a_users_template_makes_the_last_message(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(
        "{{ prompt }}|{{ demonstration }}|{% if context %}{{ context }}{% endif %}|{{ messages|length }}\n"
    )
    messages = (Message(role="system", content="S"), Message(role="user", content="Q"))
    text = teacher_text(tokenizer, "t.jinja", item(messages=messages, context="C"), tmp_path)
    assert text == turns(("system", "S"), ("user", "Q|Because {{ y }}.|C|2"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ prompt }}\n{{ demonstration }}\n{{ answer }}", r"t\.jinja:3: 'answer' is undefined .*train\.jsonl:7"),
        ("{{ prompt }}\n{% if %}{{ demonstration }}", r"t\.jinja:2: not a valid Jinja template"),
        ("{{ demonstration }}\n{{ 1 / 0 }}", r"t\.jinja:2: division by zero"),
        ("{{ demonstration.__class__.__mro__ }}", r"t\.jinja:1: .*unsafe"),
        ("{% if false %}{{ demonstration }}{% endif %}{{ prompt }}", r"t\.jinja: renders only the prompt for train"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}{{ demonstration }}", r"t\.jinja:1: .*recursion"),
        ("{{ demonstration.missing() }}", r"t\.jinja:1: .*has no attribute 'missing'"),
        ("{% for i in prompt %}" * 25 + "{{ demonstration }}" + "{% endfor %}" * 25, r"t\.jinja: .*nest it less"),
        ("{% include 'x' %}{{ demonstration }}", r"t\.jinja:1: "),
        ("{{ prompt }}", r"t\.jinja: uses neither demonstration nor context nor feedback"),
        ("{% if false %}{{ demonstration }}{% endif %}", r"t\.jinja: renders an empty message"),
        ("\n{{ [demonstration] | random }}", r"t\.jinja:2: .*No filter named 'random'"),
        ("{{ demonstration }}\n{{ lipsum() }}", r"t\.jinja:2: 'lipsum' is undefined"),
    ],
)
def test_a_mistake_in_a_users_template_names_file_and_line(
    tokenizer: Any, tmp_path: Path, source: str, expected: str
) -> None:
    (tmp_path / "t.jinja").write_text(source)
    with pytest.raises(UserError, match=expected):
        PromptBuilder(tokenizer, "t.jinja", tmp_path, None).teacher(item())


def test_a_template_that_is_not_there_is_an_error(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.template: .*no\.jinja does not exist"):
        PromptBuilder(tokenizer, "no.jinja", tmp_path, None)


def test_a_tokenizer_without_chat_template_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    bare = load_tokenizer(tiny_model)
    bare.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        PromptBuilder(bare, "paper", tmp_path, None)


def test_messages_that_the_chat_template_refuses_are_named(tiny_model: Path, tmp_path: Path) -> None:
    strict = load_tokenizer(tiny_model)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*no system role"):
        PromptBuilder(strict, "paper", tmp_path, None).student(item())


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_prompts_come_in_order_and_without_demonstration_there_is_no_teacher(tokenizer: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(tokenizer, "turn", tmp_path, None)
    question = Record("q", (Message(role="user", content="Q"),), None, None, None, "A", "eval.jsonl:1")
    pairs = build_prompts(builder, [item(), question], 1000, 1000)
    assert pairs[0].student_ids.tolist() == builder.student(item())
    assert pairs[0].teacher_ids is not None
    assert pairs[0].teacher_ids.tolist() == builder.teacher(item())
    assert pairs[1].teacher_ids is None


def test_prompts_at_the_limit_pass_and_longer_ones_are_listed(tokenizer: Any, tmp_path: Path) -> None:
    builder = PromptBuilder(tokenizer, "turn", tmp_path, None)
    student, teacher = len(builder.student(item())), len(builder.teacher(item()) or ())
    assert len(build_prompts(builder, [item()], student, teacher)) == 1
    with pytest.raises(UserError) as e:
        build_prompts(builder, [item(where=f"train.jsonl:{n}") for n in range(1, 24)], student, teacher - 1)
    lines = str(e.value).splitlines()
    assert lines[0].startswith("train.jsonl:1: ")
    assert f"{teacher} tokens" in lines[0]
    assert f"data.max_teacher_prompt_tokens is {teacher - 1}" in lines[0]
    assert lines[19].startswith("train.jsonl:20: ")
    assert lines[20] == "… and 3 more"
    assert f"raise data.max_teacher_prompt_tokens to at least {teacher}" in lines[21]
    with pytest.raises(UserError, match=rf"{student} tokens, but data\.max_prompt_tokens is {student - 1}"):
        build_prompts(builder, [item()], student - 1, teacher)


def test_the_built_in_model_keeps_its_default_system_message(smollm2: Path, tmp_path: Path) -> None:
    real = load_tokenizer(smollm2)
    text = real.decode(PromptBuilder(real, "paper", tmp_path, None).student(item()))
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nWhy {x}?<|im_end|>\n<|im_start|>assistant\n")
    end = PromptBuilder(real, "paper", tmp_path, None).end(item())
    assert (end.text, end.token_id) == ("", real.eos_token_id)
