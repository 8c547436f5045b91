"""Chat templates that behave like those of well-known models: prompts, ends, variables and the first token."""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from sdft.services.config.load import load_config
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.prompts import text_prompts
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.prepare import prepare
from tests.fakes.chat import FAMILIES, change, make_chat_model
from tests.fakes.spoiling import Work

NOW = datetime(2026, 3, 4)
THOUGHT = "<think>\nThe sea is near.\n</think>\n\nA city by the sea."
NO_SYSTEM = ("gemma", "mistral")  # families that refuse a system message


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make_chat_model(folder / name, tiny_model, family) for name, family in FAMILIES.items()}


def said(*turns: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    first = () if system is None else (Message(role="system", content=system),)
    return (*first, *(Message(role=roles[i % 2], content=text) for i, text in enumerate(turns)))  # type: ignore[typeddict-item]


def record(demonstration: str | None = "A city by the sea.", messages: tuple[Message, ...] | None = None) -> Record:
    return Record("a", messages or said("What is the capital?"), demonstration, None, None, None, "train.jsonl:7")


def builder(model: Path, template: str = "turn", system: str | None = None, **variables: Any) -> Any:
    return PromptBuilder(load_tokenizer(model), template, Path("."), system, NOW, **variables)


def token(one: Any, text: str) -> int:
    return int(one._tokenizer.convert_tokens_to_ids(text))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_reply_ends_with_the_families_token_and_engines_stop_at_every_end(models: dict[str, Path], name: str) -> None:
    one, family = builder(models[name]), FAMILIES[name]
    assert one.end(record()).token_id == token(one, family.end)
    ends = dict.fromkeys([family.end, family.eos, *family.named])
    assert one.stop_ids(record())[0] == token(one, family.end)
    assert set(one.stop_ids(record())) == {token(one, text) for text in ends}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "r1"])
@pytest.mark.parametrize(
    ("demonstration", "messages"),
    [
        ("A city by the sea.", said("What is the capital?")),
        (" \n A city\n by the sea.\n\n", said(" What is the capital?\n")),
        ("{}", said("Turn on the light.", "It is on.", "Play a song.")),
        ("think", said("What is the capital?")),
    ],
)
def test_prompt_and_demonstration_are_what_the_template_renders(
    models: dict[str, Path], name: str, demonstration: str, messages: tuple[Message, ...]
) -> None:
    one, item = builder(models[name]), record(demonstration, messages)
    tokenizer, end = one._tokenizer, token(one, FAMILIES[name].end)
    whole = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": demonstration}],
        tokenize=True,
        return_dict=False,
        strftime_now=NOW.strftime,
    )
    if name == "glm":  # the beginning of the next turn ends a reply
        whole.append(end)
    last = len(whole) - 1 - whole[::-1].index(end)
    assert one.student(item) + one.demonstration(item) == whole[: last + 1]


def test_reasoning_is_trained_as_the_template_renders_it(models: dict[str, Path]) -> None:
    thinking = builder(models["qwen"])
    for given in (THOUGHT, "<think>The sea is near.</think>A city by the sea."):
        ids = thinking.demonstration(record(given))
        assert thinking._tokenizer.decode(ids) == f"{THOUGHT}<|im_end|>"
    plain = thinking.demonstration(record())
    assert thinking._tokenizer.decode(plain) == "<think>\n\n</think>\n\nA city by the sea.<|im_end|>"
    off = builder(models["qwen"], student_variables={"enable_thinking": False})
    assert off._tokenizer.decode(off.student(record())).endswith("assistant\n<think>\n\n</think>\n\n")
    assert off._tokenizer.decode(off.demonstration(record())) == "A city by the sea.<|im_end|>"
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*ends the reasoning before a reply begins.*has <think>"):
        off.demonstration(record(THOUGHT))


def test_a_prompt_that_begins_the_reasoning_is_continued(models: dict[str, Path]) -> None:
    one = builder(models["r1"], "paper")
    for given in (THOUGHT, THOUGHT.removeprefix("<think>\n")):
        text = one._tokenizer.decode([*one.student(record(given)), *one.demonstration(record(given))])
        assert text.endswith(f"<|Assistant|>{THOUGHT}<|end_of_sentence|>")
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*begins a reply with <think>.*has no </think>"):
        one.demonstration(record())
    assert one.length(record()) > 1


def test_a_demonstration_that_is_changed_or_has_the_end_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    loud = builder(models["phi"])
    with pytest.raises(UserError, match=r"train\.jsonl:7: the demonstration has <\|end\|>, which ends a reply; remove"):
        loud.demonstration(record("A city.<|end|>"))
    loud._tokenizer.chat_template = FAMILIES["phi"].template.replace(
        "m.content", "(m.content | upper if m.role == 'assistant' and 'reply' not in m.content else m.content)"
    )
    with pytest.raises(UserError, match=r"train\.jsonl:7: .*does not show the demonstration unchanged as a reply"):
        loud.demonstration(record())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_message_is_rendered_or_refused_in_one_sentence(models: dict[str, Path], name: str) -> None:
    one = builder(models[name], "paper", system="Be brief.")
    if name not in NO_SYSTEM:
        for ids in (one.student(record()), one.teacher(record())):
            assert "Be brief." in one._tokenizer.decode(ids)
        return
    with pytest.raises(UserError, match=r"^train\.jsonl:7: .*no system message: .*set no data\.system$"):
        one.student(record())


def test_roles_that_must_alternate_are_one_sentence_with_the_row(models: dict[str, Path]) -> None:
    two = (*said("What is the capital?"), *said("Play a song."))
    with pytest.raises(UserError, match=r"^train\.jsonl:7: .*roles must alternate.*; change the messages or the templ"):
        builder(models["gemma"]).student(record(messages=two))
    assert builder(models["qwen"]).student(record(messages=two))


def test_a_default_system_message_and_the_date_are_no_errors(models: dict[str, Path]) -> None:
    qwen, llama = builder(models["qwen"]), builder(models["llama3"])
    assert "You are helpful." in qwen._tokenizer.decode(qwen.student(record()))
    assert "Today Date: 04 Mar 2026" in llama._tokenizer.decode(llama.teacher(record()))
    fixed = builder(models["llama3"], student_variables={"date_string": "1 Jan 2020"})
    assert "Today Date: 1 Jan 2020" in fixed._tokenizer.decode(fixed.student(record()))
    assert "Today Date: 04 Mar 2026" in fixed._tokenizer.decode(fixed.teacher(record()))


def test_a_variable_that_the_template_does_not_use_is_refused(models: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"data\.chat_template_kwargs: .*enable_thinkin; did you mean enable_thinking\?"
    ):
        builder(models["qwen"], teacher_variables={"enable_thinkin": True})
    with pytest.raises(UserError, match=r"does not use thinking; it uses date_string; remove thinking"):
        builder(models["llama3"], student_variables={"thinking": True})
    with pytest.raises(UserError, match=r"does not use thinking; it has no variables to set; remove thinking"):
        builder(models["gemma"], student_variables={"thinking": True})


def test_a_template_with_generation_marks_and_loop_controls_has_variables(models: dict[str, Path]) -> None:
    tokenizer: Any = load_tokenizer(models["phi"])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if false %}{% continue %}{% endif %}<|{{ m.role }}|>\n"
        "{% generation %}{{ m.content }}{{ mood }}<|end|>{% endgeneration %}{% endfor %}<|assistant|>\n"
    )
    one = PromptBuilder(tokenizer, "paper", Path("."), None, NOW, {"mood": "!"})
    assert "capital?!<|end|>" in tokenizer.decode(one.student(record()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_token_comes_once(models: dict[str, Path], name: str) -> None:
    one, family = builder(models[name], "paper"), FAMILIES[name]
    ids = one.student(record())
    assert one.lacks_first(record()) is None
    first = [token(one, text) for text in family.adds]
    assert ids[: len(first)] == first
    assert all(ids.count(i) == 1 for i in first)
    (text,) = text_prompts(one._tokenizer, [Record("a", (), None, None, None, None, "x:1", text="By the sea.")], 99)
    assert text.student_ids.tolist()[: len(first)] == first
    assert all(text.student_ids.tolist().count(i) == 1 for i in first)


def test_a_first_token_that_comes_twice_or_not_at_all_is_reported(models: dict[str, Path]) -> None:
    one = builder(models["gemma"], "paper")
    one._tokenizer.chat_template = "{{ bos_token }}" + FAMILIES["gemma"].template
    with pytest.raises(UserError, match=r"train\.jsonl:7: .* begins this prompt with <bos> twice; remove one from"):
        one.student(record())
    twice = Record("a", (), None, None, None, None, "x:1", text="<bos>By the sea.")
    with pytest.raises(UserError, match=r"x:1: the text begins with <bos>, and the tokenizer adds another one"):
        text_prompts(one._tokenizer, [twice], 99)
    one._tokenizer.chat_template = FAMILIES["gemma"].template.replace("{{ bos_token }}", "")
    assert one.student(record())[0] == token(one, "<start_of_turn>")
    assert "begins a text with <bos>, and its chat template does not write it" in str(one.lacks_first(record()))


def run(folder: Path, model: Path, **data: Any) -> Path:
    """Write a small configuration for the model."""
    work = Work(folder, model)
    work.set("data.max_prompt_tokens", 200)
    work.set("data.max_teacher_prompt_tokens", 400)
    for key, value in data.items():
        work.set(f"data.{key}", value)
    work.save()
    return folder / "my.yaml"


@pytest.mark.usefixtures("unexamined")
def test_check_says_what_ends_a_reply_and_what_is_sampled(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_chat_model(tmp_path / "m", models["llama3"], FAMILIES["llama3"])
    config = run(tmp_path, model)
    assert main(["check", str(config)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "replies end with <|eot_id|>; engines also stop at <|end_of_text|>" in lines
    plain = "rollouts are sampled with temperature 1 and top_p 1, and their log-probs are of that distribution"
    assert plain in lines
    assert not any(line.startswith("warning") for line in lines)
    ids = {"eos_token_id": [1, 4, 100]}
    change(model / "generation_config.json", top_k=20, repetition_penalty=1.05, top_p=0.8, min_p=0.0, **ids)
    change(model / "tokenizer_config.json", add_bos_token=True)
    (model / "chat_template.jinja").write_text(FAMILIES["llama3"].template.replace("{{- bos_token }}", ""))
    assert main(["check", str(config), "--set", "sampling.top_p=0.8"]) == 0
    said = capsys.readouterr().out
    assert (
        "temperature 1 and top_p 0.8, and their log-probs are of that distribution; top_k 20 and repetition_penalty "
        "1.05 in generation_config.json are not used\n"
    ) in said
    assert "names 100, which is ordinary text (" in said
    assert said.count("warning: ") == 2
    assert "begins a text with <|begin_of_text|>" in said
    assert main(["check", str(config), "--set", "method=sft"]) == 0
    assert "\nreplies to evaluation sets are greedy; top_k 20, top_p 0.8 and repeti" in capsys.readouterr().out


@pytest.mark.parametrize("named", ["two", [1, "two"], -1, True, {"a": 1}])
@pytest.mark.usefixtures("unexamined")
def test_an_end_that_is_no_token_id_is_an_error(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], named: Any
) -> None:
    model = make_chat_model(tmp_path / "m", models["phi"], FAMILIES["phi"])
    change(model / "generation_config.json", eos_token_id=named)
    assert main(["check", str(run(tmp_path, model))]) == 2
    assert "generation_config.json: eos_token_id must be a token id or a list of token ids" in capsys.readouterr().err


@pytest.mark.usefixtures("unexamined")
def test_variables_are_given_to_both_prompts_or_to_one(models: dict[str, Path], tmp_path: Path) -> None:
    closed = "<think>\n\n</think>\n\n"

    def closes(given: dict[str, Any]) -> tuple[bool, bool, str]:
        prepared = prepare(
            load_config(run(tmp_path / "r", models["qwen"], chat_template_kwargs=given)), tmp_path / "r/x"
        )
        (pair, *_), (question,) = prepared.stages[0].prompts, prepared.common[0].prompts
        texts = [prepared.tokenizer.decode(ids) for ids in (pair.student_ids, pair.teacher_ids, question.student_ids)]
        assert texts[0].endswith(closed) == texts[2].endswith(closed)
        (tmp_path / "r/my.yaml").unlink()
        return texts[0].endswith(closed), texts[1].endswith(closed), prepared.stages[0].fingerprint

    (tmp_path / "r").mkdir()
    off = {"enable_thinking": False}
    found = [
        closes(given)
        for given in ({}, off, {"student": off}, {"teacher": off}, off | {"teacher": {"enable_thinking": True}})
    ]
    assert [(student, teacher) for student, teacher, _ in found] == [
        (False, False),
        (True, True),
        (True, False),
        (False, True),
        (True, False),
    ]
    assert len({fingerprint for _, _, fingerprint in found}) == 5
    # A value that changes no prompt is another run too. The two ways to write the same variables are one run.
    assert closes({"enable_thinking": True})[2] != found[0][2]
    assert closes({"student": off, "teacher": off})[2] == found[1][2]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"messages": []}, "data.chat_template_kwargs: messages is set by the run or the tokenizer; remove it"),
        ({"teacher": {"add_generation_prompt": False}}, "teacher.add_generation_prompt is set by the run"),
        ({"student": True}, "data.chat_template_kwargs: student must be a mapping of variables"),
        ({"student": {"teacher": {}}}, "student.teacher is not the name of a variable"),
        ({"enable-thinking": True}, "enable-thinking is not the name of a variable"),
        ([1], "data.chat_template_kwargs must be a mapping, not a list"),
        ({"mood": True}, "does not use mood; it uses enable_thinking; remove mood"),
    ],
)
@pytest.mark.usefixtures("unexamined")
def test_variables_without_effect_are_one_sentence(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: Any, why: str
) -> None:
    assert main(["check", str(run(tmp_path, models["qwen"], chat_template_kwargs=given))]) == 2
    err = capsys.readouterr().err
    assert why in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.usefixtures("unexamined")
def test_variables_are_set_on_the_command_line_and_kept_in_the_resolved_configuration(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    override = "data.chat_template_kwargs.teacher.enable_thinking=false"
    assert main(["train", str(run(tmp_path, models["qwen"])), "--dry-run", "--set", override]) == 0
    said = capsys.readouterr().out
    resolved = yaml.safe_load(said[said.index("model: ") :])
    assert resolved["data"]["chat_template_kwargs"] == {"teacher": {"enable_thinking": False}}
