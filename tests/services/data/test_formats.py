"""Rows of each format: the same record, whichever way a row says it, and one sentence for every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.data.demonstrations import Record, load_demonstrations
from sdft.services.data.messages import Message

ASKED = {"role": "user", "content": "Dry?"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
REPLIED = [
    Message(role="user", content="Dry?"),
    Message(role="assistant", content="", tool_calls=[CALL]),
    Message(role="tool", content="rain"),
]


def load(folder: Path, row: Any, needed: tuple[str, ...] = ("demonstration",), **settings: Any) -> Record:
    (folder / "t.jsonl").write_text(json.dumps(row) + "\n")
    (record,) = load_demonstrations(DataConfig(train="t.jsonl", **settings), folder, needed)
    return record


def problem(folder: Path, row: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as e:
        load(folder, row, **settings)
    return str(e.value).removeprefix(f"{folder}/t.jsonl:1: ")


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, {"prompt": parts("Dr", "y?"), "demonstration": parts("N", "o.")}),
        ({}, {"prompt": [{"role": "user", "content": parts("Dry", "?")}], "demonstration": "No."}),
        ({}, {"prompt": "Dry?", "demonstration": {"role": "assistant", "content": parts("No.")}}),
        ({}, {"prompt": [ASKED, {"role": "assistant", "content": "No."}]}),
        ({}, {"messages": [ASKED, {"role": "assistant", "content": "No.", "weight": 1}], "demonstration": None}),
        ({}, {"prompt": "Dry?", "messages": [ASKED], "demonstration": "No."}),
        ({"columns": {"prompt": "chat"}}, {"chat": [ASKED, {"role": "assistant", "content": "No."}]}),
        (
            {"format": "sharegpt"},
            {"conversations": [{"from": "human", "value": "Dry?"}, {"from": "gpt", "value": "No."}]},
        ),
        ({"format": "sharegpt"}, {"conversations": [{"from": "user", "value": "Dry?"}], "demonstration": "No."}),
        (
            {"format": "sharegpt", "columns": {"conversations": "dialog"}},
            {"dialog": [{"from": "human", "value": "Dry?"}, {"from": "assistant", "value": "No."}]},
        ),
        ({"format": "alpaca"}, {"instruction": "Dry?", "input": "", "output": "No.", "text": "Below is …"}),
        ({"format": "alpaca", "columns": {"instruction": "question"}}, {"question": "Dry?", "output": "No."}),
    ],
)
def test_one_record_in_many_forms(tmp_path: Path, settings: dict[str, Any], row: dict[str, Any]) -> None:
    record = load(tmp_path, row, **settings)
    assert (list(record.messages), record.demonstration, record.tools) == ([ASKED], "No.", None)


def test_alpaca_has_input_system_and_history(tmp_path: Path) -> None:
    row = {"system": "S", "history": [["a", "b"]], "instruction": "I", "input": "in", "output": "O"}
    record = load(tmp_path, row, format="alpaca")
    said = [(m["role"], m["content"]) for m in record.messages]
    assert said == [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "I\n\nin")]
    assert record.demonstration == "O"
    assert load(tmp_path, {"instruction": "I", "context": "C"}, ("context",), format="alpaca").demonstration is None


@pytest.mark.parametrize(
    ("settings", "row"),
    [
        ({}, {"messages": [ASKED, {"role": "assistant", "tool_calls": [CALL | {"index": 0}], "content": None}]}),
        (
            {},
            {
                "prompt": [
                    ASKED,
                    {"role": "assistant", "tool_calls": [{"name": "look", "arguments": '{"at": "sky"}'}]},
                ]
            },
        ),
        (
            {"format": "sharegpt"},
            {
                "conversations": [
                    {"from": "human", "value": "Dry?"},
                    {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
                ]
            },
        ),
    ],
)
def test_a_call_may_be_history_or_the_demonstration(
    tmp_path: Path, settings: dict[str, Any], row: dict[str, list[Any]]
) -> None:
    """The arguments become an object, as chat templates expect."""
    record = load(tmp_path, row, **settings)
    assert (list(record.messages), record.demonstration) == (REPLIED[:1], REPLIED[1])
    (column, said), *_ = row.items()
    of_tool = {"from": "observation", "value": "rain"} if settings else {"role": "tool", "content": "rain"}
    record = load(tmp_path, {column: [*said, of_tool], "demonstration": "No."}, **settings)
    assert (list(record.messages), record.demonstration) == (REPLIED, "No.")


@pytest.mark.parametrize("given", [[{"name": "look"}], '[{"name": "look"}]'])
def test_tools_are_a_list_or_its_json_text(tmp_path: Path, given: Any) -> None:
    row = {"prompt": "Dry?", "demonstration": "No.", "tools": given}
    assert load(tmp_path, row).tools == [{"name": "look"}]
    assert load(tmp_path, row | {"tools": "[]"}).tools is None


def test_tools_in_parquet_are_those_of_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tools = [{"name": name, "parameters": {"properties": {name: {"type": "string"}}}} for name in ("a", "b")]
    rows = [{"messages": [ASKED, {"role": "assistant", "content": "No."}], "tools": [tool]} for tool in tools]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    loaded = load_demonstrations(DataConfig(train="t.parquet"), tmp_path, ["demonstration"])
    assert [record.tools for record in loaded] == [[tool] for tool in tools]
    assert [record.demonstration for record in loaded] == ["No.", "No."]


def prompt(*messages: Any) -> dict[str, Any]:
    return {"prompt": list(messages), "demonstration": "No."}


def calling(call: Any) -> dict[str, Any]:
    return prompt(ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            prompt({"role": "user", "content": [*parts("a"), {"type": "image_url", "image_url": {"url": "u"}}]}),
            "prompt message 1: content part 2 is of type image_url, and data is text only today; remove the part",
        ),
        (prompt({"role": "user", "content": ["a"]}), "prompt message 1: content part 1 must be an object such as"),
        (prompt({"role": "user", "content": [{"text": "a"}]}), "content part 1 must be an object such as"),
        (prompt({"role": "user", "content": [{"type": "text"}]}), "prompt message 1: content part 1: text is null"),
        (prompt({"role": "user", "content": []}), "prompt message 1: content is empty"),
        (prompt({"role": "user", "content": parts(" ")}), "prompt message 1: content is empty"),
        (prompt(ASKED | {"content": [*parts("a")[:0], parts("a")[0] | {"cache": 1}]}), "part 1: cache is not used"),
        ({"prompt": "Dry?", "demonstration": [{"type": "audio"}]}, "demonstration part 1 is of type audio"),
        (
            {"prompt": "Dry?", "demonstration": {"role": "user", "content": "x"}},
            "demonstration: role must be assistant",
        ),
        ({"prompt": "Dry?", "demonstration": {"role": "assistant"}}, "demonstration: content is null"),
        ({"prompt": [ASKED, {"role": "assistant", "content": ""}]}, "prompt message 2: content is empty"),
        (
            prompt(ASKED, {"role": "assistant", "content": "Yes."}),
            "prompt: the last message must be the user's, not the assistant's, because the row also has a",
        ),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, "prompt: no message is the user's"),
        (
            {"messages": [ASKED, {"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]},
            "messages: the last message before the reply must be the user's or a tool's, not the system's",
        ),
        ({"messages": [ASKED, {"role": "assistant", "content": "x", "weight": 0}]}, "messages message 2: weight is 0"),
        ({"messages": [ASKED]}, "demonstration is missing (the row has messages)"),
        (prompt({"role": "tool", "content": "x"}), "prompt: no message is the user's"),
        (prompt(ASKED, {"role": "tool"}), "prompt message 2: content is null"),
        (
            prompt(ASKED, {"role": "tool", "content": "x", "name": 3}),
            "prompt message 2: name must be text, not a number",
        ),
        (calling("look"), "prompt message 2: tool_calls entry 1 must be an object with the name of a function"),
        (calling({"function": {"arguments": {}}}), "entry 1 must be an object with the name of a function"),
        (calling({"name": "look", "arguments": "{"}), "entry 1: arguments: not valid JSON"),
        (calling({"name": "look", "arguments": "[1]"}), "entry 1: arguments must be an object"),
        (calling({"name": "look", "parameters": {"a": 1}}), "entry 1: parameters is not used"),
        (calling({"name": "look", "type": "code"}), "entry 1 is of type code"),
        (calling({"name": "look", "arguments": {"a": "\0"}}), "entry 1 holds a NUL character"),
        (prompt(ASKED, {"role": "assistant", "tool_calls": {"name": "look"}}), "tool_calls must be a list of calls"),
        ({"prompt": "Dry?", "demonstration": "No.", "tools": "look"}, "tools: not valid JSON"),
        (
            {"prompt": "Dry?", "demonstration": "No.", "tools": {"name": "look"}},
            "tools must be a list of tool definitions",
        ),
        (
            {"prompt": "Dry?", "demonstration": "No.", "tools": [{"type": "web"}]},
            "tools entry 1 must be an object with a",
        ),
        ({"conversations": [{"from": "human", "value": "x"}]}, "set data.format: sharegpt to read conversations"),
    ],
)
def test_a_bad_row_is_one_sentence(tmp_path: Path, row: Any, expected: str) -> None:
    said = problem(tmp_path, row)
    assert expected in said
    assert "; demonstration is missing" not in said


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "x", "demonstration": "y"}, "prompt is not read in data.format: sharegpt, which has conversations"),
        ({}, "conversations is missing (the row has no columns)"),
        ({"conversations": None}, "conversations is null"),
        ({"conversations": "x"}, "conversations must be a list of turns, not text"),
        ({"conversations": []}, "conversations is an empty list"),
        ({"conversations": ["x"]}, "conversations turn 1 must be an object with from and value, not text"),
        ({"conversations": [ASKED]}, "conversations turn 1: from must be one of system, human, user"),
        ({"conversations": [{"from": "human"}]}, "conversations turn 1: value is null"),
        ({"conversations": [{"from": "human", "value": "x", "image": "a"}]}, "turn 1: image is not used"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "demonstration is missing (the row has conversations)"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "conversations: no message is the user's"),
        ({"conversations": [{"from": "function_call", "value": "look()"}]}, "turn 1: value: not valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "turn 1: value has no call"),
        ({"conversations": [{"from": "system", "value": "x"}], "system": "y"}, "conversations has a system turn too"),
    ],
)
def test_a_bad_sharegpt_row_is_one_sentence(tmp_path: Path, row: Any, expected: str) -> None:
    assert expected in problem(tmp_path, row, format="sharegpt")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"output": "x"}, "instruction is missing (the row has output)"),
        ({"instruction": " ", "output": "x"}, "instruction is empty"),
        ({"instruction": 3, "output": "x"}, "instruction must be text, not a number"),
        ({"instruction": "x"}, "output is missing (the row has instruction)"),
        ({"instruction": "x", "output": None}, "output is null"),
        ({"instruction": "x", "output": ""}, "output is empty"),
        ({"instruction": "x", "output": "y", "input": 3}, "input must be text, not a number"),
        ({"instruction": "x", "output": "y", "history": "z"}, "history must be a list of pairs"),
        ({"instruction": "x", "output": "y", "history": [["z"]]}, "history entry 1 must be a list of two texts"),
        ({"instruction": "x", "output": "y", "history": [["z", ""]]}, "history entry 1: reply is empty"),
        ({"instruction": "x", "output": "y", "demonstration": "z"}, "demonstration is not read in data.format: alpaca"),
        ({"instruction": "x", "output": "y", "images": ["z"]}, "images is not used"),
    ],
)
def test_a_bad_alpaca_row_is_one_sentence(tmp_path: Path, row: Any, expected: str) -> None:
    assert expected in problem(tmp_path, row, format="alpaca")
