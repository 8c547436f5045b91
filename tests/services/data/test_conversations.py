"""Logged conversations: which replies become records, what the teacher is shown of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.data.conversations import about
from sdft.services.data.demonstrations import Record, load_conversations
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sources.open import open_source

CALL = {"function": {"name": "look", "arguments": {"at": "hall"}}}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def loaded(folder: Path, *rows: Any, needed: str = "feedback", **data: Any) -> tuple[list[Record], int]:
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_conversations(DataConfig(train="log.jsonl", **data), folder, [needed])


def said(record: Record) -> list[str]:
    return [message["content"] for message in record.messages]


def test_each_reply_that_a_user_answers_is_a_record_with_what_was_before_it(tmp_path: Path) -> None:
    whole = [system("Brief."), user("Hi"), reply("Ho"), user("Who?"), reply("I."), user("Thanks"), reply("Bye")]
    (first, second), unanswered = loaded(tmp_path, {"messages": whole, "id": "a"})
    assert (said(first), said(second)) == (["Brief.", "Hi"], ["Brief.", "Hi", "Ho", "Who?"])
    assert (first.feedback, second.feedback) == (about("Ho", "Who?"), about("I.", "Thanks"))
    assert (first.id, second.id, unanswered) == ("a/3", "a/5", 0)
    assert [Path(r.where).name for r in (first, second)] == ["log.jsonl:1 message 3", "log.jsonl:1 message 5"]
    assert (first.demonstration, second.demonstration) == (None, None)


def test_a_reply_behind_a_tool_is_one_and_a_call_or_a_greeting_is_none(tmp_path: Path) -> None:
    tool = {"role": "tool", "content": "dark"}
    row = [reply("Hello!"), user("Look."), reply("", tool_calls=[CALL]), tool, reply("It is dark."), user("Light it.")]
    (record,), _ = loaded(tmp_path, {"prompt": row})
    assert (said(record), record.feedback) == (["Hello!", "Look.", "", "dark"], about("It is dark.", "Light it."))


def test_the_reply_is_shown_without_its_reasoning_and_with_its_calls(tmp_path: Path) -> None:
    row = {"prompt": [user("Hi"), reply("<think>Hm.</think>Ho", tool_calls=[CALL]), user("No")]}
    (record,), _ = loaded(tmp_path, row)
    shown = 'Ho\n{"name": "look", "arguments": {"at": "hall"}}'
    assert record.feedback == about(shown, "No")


def test_a_row_with_its_own_feedback_or_demonstration_is_one_record(tmp_path: Path) -> None:
    history = [user("Hi"), reply("Ho"), user("Who?")]
    rows = [{"prompt": history, "feedback": "x"}, {"prompt": history, "demonstration": "I."}]
    (first, second), _ = loaded(tmp_path, *rows, needed="demonstration|feedback")
    assert (said(first), first.feedback, Path(first.where).name) == (["Hi", "Ho", "Who?"], "x", "log.jsonl:1")
    assert (said(second), second.demonstration, second.feedback) == (["Hi", "Ho", "Who?"], "I.", None)


def test_conversations_in_other_columns_and_formats(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}, {"from": "human", "value": "No"}]
    for row, settings in (
        ({"conversations": turns}, {"format": "sharegpt"}),
        ({"log": [user("Hi"), reply("Ho"), user("No")]}, {"columns": {"prompt": "log"}}),
    ):
        (record,), _ = loaded(tmp_path, row, **settings)
        assert (said(record), record.feedback) == (["Hi"], about("Ho", "No"))


def test_conversations_without_an_answered_reply_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": [user("Hi"), reply("Ho"), user("No")]}, {"prompt": [user("Hi"), reply("Ho")]}]
    records, unanswered = loaded(tmp_path, *rows, {"prompt": [user("Hi")]})
    assert (len(records), unanswered) == (1, 2)
    with pytest.raises(UserError, match="in none of the 1 conversations a user's message follows a reply"):
        loaded(tmp_path, rows[1])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Hi"}, "log.jsonl:1: feedback is missing"),
        ({"messages": [user("Hi"), reply("Ho"), user(" ")]}, "log.jsonl:1: messages message 3: content is empty"),
        ({"messages": [user("Hi"), reply("Ho"), user("No")], "images": ["a"]}, "log.jsonl:1: images is not used"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(UserError) as found:
        loaded(tmp_path, row)
    assert words in str(found.value)


def test_two_conversations_with_one_id_are_refused(tmp_path: Path) -> None:
    row = {"prompt": [user("Hi"), reply("Ho"), user("No")], "id": "a"}
    with pytest.raises(UserError, match=r'log\.jsonl:2: id "a/2" is already used in .*log\.jsonl:1'):
        loaded(tmp_path, row, row)


def test_a_line_of_a_log_may_give_several_records_and_a_long_one_is_left_out(tmp_path: Path) -> None:
    def build(records: Any) -> list[PromptPair]:
        (record,) = records
        if len(record.messages) > 3:
            raise UserError(f"{record.where}: too long")
        return [PromptPair.of([len(record.messages)], [1])]

    log = tmp_path / "log.jsonl"
    turns = [user("1"), reply("2"), user("3"), reply("4"), user("5"), reply("6"), user("7")]
    log.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (turns, turns[:2], turns[:3])))
    data = DataConfig(train=str(log), source="log")
    source = open_source(data, tmp_path, ("prompt", "feedback"), build, conversations=True)
    assert [len(record.messages) for record in source.records] == [1, 3, 1]
    assert [pair.student_ids.tolist() for pair in source.prompts] == [[1], [3], [1]]
    assert source.skipped == [
        f"{log}:1 message 6: too long",
        f"{log}:2: no user's message follows a reply, and there is no column feedback; add one of them",
    ]
