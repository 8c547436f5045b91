"""What chat templates leave out, where a reply begins and what ends it: checked before a run starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.data.chat_template import ReplyEnd
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.pairs import PromptPair
from sdft.services.data.prompts import build_prompts, check_ids
from sdft.services.data.tokenizer import load_tokenizer, vocabulary_of
from tests.fakes.spoiling import Work, chat_template
from tests.fakes.tiny import TEMPLATE

EACH = "{% for m in messages %}"
OPEN = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
INSTRUCT = (
    f"{EACH}{{{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else ' ' + m['content'] + "
    "'<|endoftext|>' }}{% endfor %}"
)
THOUGHT = "<think>The sea is near.</think>Oslo."
# Templates of reasoning models keep only the answer of earlier turns.
CUTS_THOUGHTS = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}",
)


def record(prompt: str = "Which city?", demonstration: str = "Oslo.", *earlier: Message) -> Record:
    messages = (*earlier, Message(role="user", content=prompt))
    return Record("a", messages, demonstration, None, None, None, "train.jsonl:7")


def builder(model: Path, chat_template: Any, template: str = "turn", system: str | None = None, **more: Any) -> Any:
    """Return the builder of the tiny model with another chat template. more: other attributes of the tokenizer."""
    tokenizer: Any = load_tokenizer(model)
    tokenizer.chat_template = chat_template
    for name, value in more.items():
        setattr(tokenizer, name, value)
    return PromptBuilder(tokenizer, template, Path("."), system)


@pytest.mark.parametrize(
    ("chat_template", "lost"),
    [
        (f"{EACH}{{% for part in m['content'] %}}{{{{ part.text }}}}{{% endfor %}}{OPEN}", "the user's message"),
        (f"{{{{ messages[-1]['content'] }}}}{EACH}{OPEN}", "the whole demonstration as an earlier turn"),
        (f"{EACH}{{{{ m['content'] | upper }}}}{OPEN}", "the user's message"),
        (TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[1:] %}"), "leaves out the system message"),
    ],
)
def test_a_message_that_the_template_does_not_show_is_an_error(tiny_model: Path, chat_template: str, lost: str) -> None:
    system = "Be brief." if "system" in lost else None
    with pytest.raises(UserError, match=rf"train\.jsonl:7: the chat template of the tokenizer in .*{lost}"):
        build_prompts(builder(tiny_model, chat_template, system=system), [record()], 1000, 1000)


def test_a_demonstration_whose_reasoning_is_cut_is_an_error_that_names_a_template_that_shows_it(
    tiny_model: Path,
) -> None:
    one = record(demonstration=THOUGHT)
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*cut the reasoning there.*data\.template: paper"):
        builder(tiny_model, CUTS_THOUGHTS).teacher(one)
    shown = builder(tiny_model, CUTS_THOUGHTS, "paper")
    assert THOUGHT in shown._tokenizer.decode(shown.teacher(one))
    whole = builder(tiny_model, TEMPLATE)
    assert THOUGHT in whole._tokenizer.decode(whole.teacher(one))


def test_the_reasoning_of_a_prompts_own_earlier_turns_may_be_cut(tiny_model: Path) -> None:
    """Templates of reasoning models do this in every use of the model."""
    earlier = (Message(role="user", content="Hi"), Message(role="assistant", content=THOUGHT))
    one = builder(tiny_model, CUTS_THOUGHTS)
    text = one._tokenizer.decode(one.student(record("Which city?", "Oslo.", *earlier)))
    assert "The sea" not in text
    assert "Oslo." in text


def test_white_space_may_be_trimmed_and_a_system_message_moved(tiny_model: Path) -> None:
    moved = (
        "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last %}{{ system }}\n{% endif %}{{ m['content'] | trim }}<|im_end|>\n" + OPEN
    )
    one = builder(tiny_model, moved, system="Be brief.")
    text = one._tokenizer.decode(one.teacher(record(" Which city?\n", " Oslo. ")))
    assert "Be brief.\nWhich city?<|im_end|>" in text


def test_a_prompt_that_ends_before_the_reply_begins_is_an_error(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="ignores add_generation_prompt"):
        builder(tiny_model, TEMPLATE.replace("add_generation_prompt", "false")).end(record())


@pytest.mark.parametrize(
    ("chat_template", "reply", "end"),
    [
        (TEMPLATE, "Oslo.", ReplyEnd("", 2, "<|im_end|>\n")),
        (
            TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}\n"),
            "Oslo.\n",
            ReplyEnd("\n", 2, "\n<|im_end|>\n"),
        ),
        # As in Mistral's: nothing opens a reply, a space comes first, and the end of the text is the end of a turn.
        (INSTRUCT, " Oslo.", ReplyEnd("", 0, "<|endoftext|>")),
        # As in Phi 3's: the end of a turn, which config.json names, comes before eos_token.
        (
            TEMPLATE.replace("<|im_end|>", "<|im_end|><|endoftext|>"),
            "Oslo.",
            ReplyEnd("", 2, "<|im_end|><|endoftext|>\n"),
        ),
        # As in Command R7B's: the first special token is not an end that the model's files name.
        (
            TEMPLATE.replace("<|im_end|>", "<|im_start|><|im_end|>"),
            "Oslo.<|im_start|>",
            ReplyEnd("<|im_start|>", 2, "<|im_start|><|im_end|>\n"),
        ),
        # As in GLM 4's: the beginning of the next turn ends a reply.
        (f"{EACH}<|im_start|>{{{{ m['role'] }}}}\n{{{{ m['content'] }}}}{OPEN}", "Oslo.", ReplyEnd("", 1, "")),
        # Without special tokens the tokenizer's eos_token ends a reply.
        (
            f"{EACH}{{{{ m['role'] }}}}: {{{{ m['content'] }}}}\n{OPEN.replace('<|im_start|>', '')}",
            "Oslo.",
            ReplyEnd("", 0, "\n"),
        ),
    ],
)
def test_a_reply_ends_with_what_the_template_appends(
    tiny_model: Path, chat_template: str, reply: str, end: ReplyEnd
) -> None:
    """The tokenizer's eos_token does not matter; some of these templates do not use it."""
    one = builder(tiny_model, chat_template, eos_token="<|endoftext|>")
    assert one.end(record()) == end
    assert one.demonstration(record()) == [*one._tokenizer.encode(reply), end.token_id]


def test_a_tokenizer_without_eos_token_is_refused_only_where_nothing_else_ends_a_reply(tiny_model: Path) -> None:
    assert builder(tiny_model, TEMPLATE, eos_token=None).demonstration(record())[-1] == 2
    plain = f"{EACH}{{{{ m['role'] }}}}: {{{{ m['content'] }}}}\n{OPEN.replace('<|im_start|>', '')}"
    with pytest.raises(UserError, match=r"no token ends a reply: .*set eos_token"):
        builder(tiny_model, plain, eos_token=None).demonstration(record())


@pytest.mark.parametrize(
    ("eos_token", "named", "warns"),
    [
        ("<|im_end|>", 0, False),
        ("<|endoftext|>", [0, 2], False),
        ("<|endoftext|>", 0, True),
        ("<|endoftext|>", [], True),
    ],
)
@pytest.mark.usefixtures("unexamined")
def test_check_warns_of_an_end_that_other_servers_of_the_model_do_not_know(
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
    eos_token: str,
    named: int | list[int],
    warns: bool,
) -> None:
    work = Work(tmp_path, tiny_model)
    chat_template(TEMPLATE)(work)
    for name, changes in (
        ("generation_config.json", {"eos_token_id": named}),
        ("tokenizer_config.json", {"eos_token": eos_token}),
    ):
        path = tmp_path / "m" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    work.save()
    assert main(["check", str(tmp_path / "my.yaml")]) == 0
    said = capsys.readouterr().out
    assert ("warning: a reply ends with <|im_end|>" in said) == warns
    assert ("add 2 to eos_token_id" in said) == warns


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages[9]['content'] }}", "no element 9"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages | no_such_filter }}", "No filter named"),
        ("{% for", "unexpected|Unexpected|expected"),
    ],
)
def test_whatever_goes_wrong_in_a_chat_template_is_one_sentence(tiny_model: Path, source: str, why: str) -> None:
    with pytest.raises(UserError, match=rf"train\.jsonl:7: the chat template of the tokenizer in .*({why}).*change"):
        builder(tiny_model, source).student(record())


def test_chat_templates_without_a_default_are_named(tiny_model: Path) -> None:
    with pytest.raises(UserError, match="chat templates named rag, tool_use and none named default"):
        builder(tiny_model, {"tool_use": TEMPLATE, "rag": TEMPLATE})
    one = builder(tiny_model, {"tool_use": "no", "default": TEMPLATE})
    assert one.student(record()) == builder(tiny_model, TEMPLATE).student(record())


def test_a_token_without_a_row_in_the_embedding_is_an_error() -> None:
    pairs = [PromptPair.of([1, 511], None, [3]), PromptPair.of([1], [512])]
    check_ids([record()] * 2, pairs, 513)
    check_ids([record()] * 2, pairs, None)
    with pytest.raises(UserError, match=r"train\.jsonl:7: the tokenizer gives token 512, .*tokens 0 to 511 only"):
        check_ids([record()] * 2, pairs, 512)


def test_rows_beyond_the_tokenizer_are_no_tokens_and_a_token_beyond_the_rows_is_an_error(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokens = len(tokenizer)
    assert tokens < 512
    assert vocabulary_of(tokenizer, 512) == vocabulary_of(tokenizer, tokens) == vocabulary_of(tokenizer, None) == tokens
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    assert vocabulary_of(tokenizer, tokens + 1) == tokens + 1
    with pytest.raises(
        UserError, match=rf"has the token <new> with id {tokens}, .* tokens 0 to {tokens - 1} only; put"
    ):
        vocabulary_of(tokenizer, tokens)


def test_a_token_that_stands_for_an_image_needs_no_row(tiny_model: Path) -> None:
    """As in Gemma 3's models for text, which have 262144 rows and the token <image_soft_token> with this id."""
    tokenizer: Any = load_tokenizer(tiny_model)
    tokens = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.image_token = "<image>"
    assert vocabulary_of(tokenizer, tokens) == tokens


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"model": {"type": "of tomorrow"}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded_is_one_sentence(
    tiny_model: Path, tmp_path: Path, name: str, content: str
) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=r"model: the tokenizer in .* cannot be loaded \(.+\); check tokenizer\.json"):
        load_tokenizer(tmp_path)
