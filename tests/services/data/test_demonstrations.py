"""Demonstrations and questions: what is read, and how the errors name a bad row."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.data import DataConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.demonstrations import load_demonstrations, load_questions
from sdft.services.grading.graders import GRADERS

PAPER = Path(__file__).parents[4] / "shared" / "data"
ROW = {"prompt": "What?", "demonstration": "That."}
ROW_MESSAGE = {"role": "user", "content": "What?"}
CALL = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "look"}}]}


def write(folder: Path, *lines: Any) -> None:
    """Write train.jsonl from rows, or from bytes unchanged."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "train.jsonl").write_bytes(b"\n".join(raw) + b"\n")


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


def problems(folder: Path, *lines: Any) -> list[str]:
    """Return the lines of the error, without the folder's name."""
    write(folder, *lines)
    with pytest.raises(UserError) as e:
        load_demonstrations(DataConfig(train="train.jsonl"), folder, ["demonstration"])
    return str(e.value).replace(f"{folder}/", "").splitlines()


def questions(folder: Path, grader: Any, *rows: Any) -> list[Any]:
    write(folder, *rows)
    return load_questions(
        EvaluationSet(name="q", file="train.jsonl", grader=grader), folder, GRADERS[grader].check_answer
    )


def test_an_answer_may_be_nested_deeper_than_calls(tmp_path: Path) -> None:
    deep = b"[" * 600 + b"]" * 600
    write(tmp_path, b'{"prompt": "a", "demonstration": "b", "answer": ' + deep + b"}")
    (row,) = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert json.dumps(row.answer).encode() == deep


def test_columns_may_have_other_names_and_a_demonstration_may_come_in_lines(tmp_path: Path) -> None:
    write(tmp_path, {"question": "What?", "golden_response": ["One.", "Two."], "prompt": "not this", "id": "x"})
    columns = {"prompt": "question", "demonstration": "golden_response"}
    (row,) = load_demonstrations(DataConfig(train="train.jsonl", columns=columns), tmp_path, ["demonstration"])
    assert (row.messages[0]["content"], row.demonstration, row.id) == ("What?", "One.\nTwo.", "x")
    with pytest.raises(UserError, match=r"train\.jsonl:1: the setting columns names output, but the row has question"):
        load_demonstrations(DataConfig(train="train.jsonl", columns={"answer": "output"}), tmp_path, [])


@pytest.mark.parametrize(
    ("name", "grader", "columns", "count"),
    [("tooluse_eval", "tool_call", {"answer": "golden_answer"}, 97), ("science_eval", "choice", {}, 507)],
)
def test_the_papers_evaluation_files_are_read_as_they_are(
    name: str, grader: Any, columns: dict[Any, str], count: int
) -> None:
    path = PAPER / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here: the paper's evaluation data are not part of this project")
    settings = EvaluationSet(name="q", file=str(path), grader=grader, columns=columns)
    asked = load_questions(settings, path.parent, GRADERS[grader].check_answer)
    assert len(asked) == count
    if grader == "choice":
        replies = [f"<reasoning>\nSo.\n</reasoning>\n<answer>\n{q.answer}\n</answer>" for q in asked]
        assert all(GRADERS[grader].grade(reply, q.answer) for reply, q in zip(replies, asked, strict=True))
        assert sum(GRADERS[grader].grade(replies[0], q.answer) for q in asked) < 0.3 * count


@pytest.mark.parametrize(
    ("rows", "expected"), [(None, "0123456789"), (4, "0257"), (10, "0123456789"), (99, "0123456789")]
)
def test_rows_limits_a_set_to_questions_spread_over_its_file(tmp_path: Path, rows: int | None, expected: str) -> None:
    write(tmp_path, *({"prompt": "p", "answer": str(i)} for i in range(10)))
    settings = EvaluationSet(name="q", file="train.jsonl", grader="exact", rows=rows)
    assert "".join(q.answer for q in load_questions(settings, tmp_path, GRADERS["exact"].check_answer)) == expected


def test_a_file_is_read_whole_and_in_order(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    write(
        tmp_path,
        b"\xef\xbb\xbf" + json.dumps(ROW).encode(),
        b"",
        {"id": 7, "prompt": chat, "demonstration": "Yes \u2028 no.", "context": "C", "answer": [1], "other": 3},
        b'{"prompt": "a\\u00e4", "demonstration": "b", "id": "x", "context": null}\r',
    )
    first, second, third = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert (first.id, first.messages, first.context) == ("row-1", ({"role": "user", "content": "What?"},), None)
    assert (second.id, second.messages, second.context, second.answer) == ("7", tuple(chat), "C", [1])
    assert second.demonstration == "Yes \u2028 no."
    assert (third.id, third.messages[0]["content"], third.context) == ("x", "aä", None)
    assert [d.where.rsplit(":", 1)[1] for d in (first, second, third)] == ["1", "3", "4"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (ROW | {"demonstration": " \n"}, ["demonstration", "empty"]),
        (ROW | {"demonstration": None}, ["demonstration"]),
        (ROW | {"demonstration": 3}, ["demonstration", "must be text"]),
        (ROW | {"prompt": ""}, ["prompt", "empty"]),
        (ROW | {"prompt": 3}, ["prompt", "must be text or a list"]),
        (ROW | {"prompt": []}, ["prompt", "empty list"]),
        (ROW | {"prompt": ["x"]}, ["message 1", "role and content"]),
        (ROW | {"prompt": [{"role": "human", "content": "x"}]}, ["message 1", "human", "system, user, assistant"]),
        (ROW | {"prompt": [{"role": "user", "content": ""}]}, ["message 1", "content", "empty"]),
        (ROW | {"prompt": [{"role": "user", "content": 1}]}, ["message 1", "content", "text"]),
        (ROW | {"prompt": [{"role": "assistant", "content": "x"}]}, ["last", "must be the user's"]),
        (ROW | {"functions": [{"name": "f"}]}, ["functions is not used", "write it into the prompt, or remove it"]),
        (ROW | {"images": ["a.png"]}, ["images is not used"]),
        (ROW | {"system": "Be brief."}, ["system is not used"]),
        (ROW | {"input": "A text to summarise."}, ["input is not used"]),
        (ROW | {"prompt": [CALL | {"role": "user"}]}, ["prompt message 1: tool_calls is not used"]),
        (ROW | {"prompt": [ROW_MESSAGE | {"name": "Ann"}]}, ["prompt message 1: name is not used"]),
        (ROW | {"prompt": [{"role": "assistant", "content": "x", "reasoning_content": "So."}]}, ["reasoning_content"]),
        (ROW | {"id": True}, ["id", "text or a whole number"]),
        (ROW | {"context": 3}, ["context", "must be text"]),
        (ROW | {"prompt": "a\0b"}, ["prompt", "NUL"]),
        (ROW | {"demonstration": "\ud83d"}, ["demonstration", "surrogate"]),
        ({"prompt": "x", "demonstrations": "y"}, ["demonstration is missing", "demonstrations", "did you mean"]),
        ([ROW], ["list", "object"]),
        (b'{"prompt": "x", "demonstra', ["JSON"]),
        (b'{"prompt": "\xff"}', ["UTF-8"]),
    ],
)
def test_a_bad_row_is_named_by_line_and_reason(tmp_path: Path, row: Any, words: list[str]) -> None:
    bad, *_ = problems(tmp_path, ROW, b"", row, ROW)
    assert bad.startswith("train.jsonl:3: ")
    for word in words:
        assert word in bad


def test_empty_or_irrelevant_columns_and_members_are_ignored(tmp_path: Path) -> None:
    """Ids, sources, and the empty fields that data sets write if a message has no tool calls or images."""
    empty: dict[str, Any] = {"tool_calls": None, "name": "", "id": "m1", "timestamp": 3, "weight": 1}
    row = ROW | {
        "prompt": [ROW_MESSAGE | empty],
        "tools": [],
        "images": None,
        "input": "",
        "source": "wiki",
        "score": 2,
    }
    write(tmp_path, row)
    (one,) = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert one.messages == (ROW_MESSAGE,)
    renamed = DataConfig(train="train.jsonl", columns={"prompt": "input"})
    write(tmp_path, {"input": "What?", "demonstration": "That."})
    assert load_demonstrations(renamed, tmp_path, ["demonstration"])[0].messages == (ROW_MESSAGE,)


def test_an_optional_column_may_be_empty(tmp_path: Path) -> None:
    """As in Dolly, whose context is empty for questions without one."""
    write(tmp_path, ROW | {"context": "", "feedback": " "}, ROW | {"id": ""})
    first, second = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert (first.context, first.feedback, second.id) == (None, None, "row-2")
    (bad,) = problems(tmp_path, ROW | {"demonstration": ""})
    assert bad == "train.jsonl:1: demonstration is empty"


def test_training_data_needs_no_answer(tmp_path: Path) -> None:
    write(tmp_path, ROW | {"answers": ["a", "b"]})
    (row,) = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert row.answer is None


def test_equal_ids_are_an_error_that_names_both_lines(tmp_path: Path) -> None:
    bad, *_ = problems(tmp_path, ROW | {"id": 5}, ROW, ROW | {"id": "5"})
    assert bad.startswith("train.jsonl:3: ")
    assert "train.jsonl:1" in bad


def test_a_given_id_that_equals_a_default_one_is_an_error(tmp_path: Path) -> None:
    bad, *_ = problems(tmp_path, ROW, ROW | {"id": "row-1"})
    assert bad.startswith("train.jsonl:2: ")


def test_all_bad_rows_are_listed_up_to_twenty(tmp_path: Path) -> None:
    lines = problems(tmp_path, *[ROW | {"prompt": ""}] * 23)
    assert [line.split(" ")[0] for line in lines[:20]] == [f"train.jsonl:{n}:" for n in range(1, 21)]
    assert lines[20] == "… and 3 more"


def test_a_row_may_need_one_of_two_columns(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"prompt": "a", "demonstration": "b"}\n{"prompt": "a", "feedback": "b"}\n{"prompt": "a", "feedback": " "}\n'
    )
    data = DataConfig(train="t.jsonl")
    with pytest.raises(UserError) as found:
        load_demonstrations(data, tmp_path, ["demonstration|feedback"])
    assert str(found.value) == f"{tmp_path}/t.jsonl:3: demonstration and feedback are missing; give one of them"
    (tmp_path / "t.jsonl").write_text("")
    with pytest.raises(UserError, match="with prompt and demonstration or feedback"):
        load_demonstrations(data, tmp_path, ["demonstration|feedback"])


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    assert "no rows" in problems(tmp_path, b"", b"  ")[0]


def test_a_parquet_file_gives_the_same_rows_as_jsonl(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rows = [
        {"prompt": chat, "demonstration": "a", "id": "one", "context": None},
        {"prompt": chat[1:], "demonstration": "b", "id": None, "context": "c"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    write(tmp_path, *rows)
    from_parquet = load_demonstrations(DataConfig(train="train.parquet"), tmp_path, ["demonstration"])
    from_jsonl = load_demonstrations(DataConfig(train="train.jsonl"), tmp_path, ["demonstration"])
    assert [(d.id, d.messages, d.demonstration, d.context) for d in from_parquet] == [
        (d.id, d.messages, d.demonstration, d.context) for d in from_jsonl
    ]
    assert "train.parquet" in from_parquet[1].where


def test_an_answer_in_parquet_has_only_its_own_members(tmp_path: Path) -> None:
    """Arrow gives every row of a column the members of all rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    answers = [
        [{"Action": "light", "Action_Input": {"room": "hall"}}],
        [{"Action": "play", "Action_Input": {"title": "Help!"}}, {"Action": "stop", "Action_Input": {}}],
    ]
    rows = [{"prompt": "Do it.", "answer": answer} for answer in answers]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
    one = EvaluationSet(name="q", file="q.parquet", grader="tool_call")
    assert [q.answer for q in load_questions(one, tmp_path, GRADERS["tool_call"].check_answer)] == answers


@pytest.mark.parametrize("name", ["run[1]/t.parquet", "a::b/t.parquet", "run=1/t.parquet", "a*/t?.parquet"])
def test_a_parquet_file_is_read_as_that_file_whatever_its_name(tmp_path: Path, name: str) -> None:
    """Other files lie beside it that match its name as a pattern."""
    for other in (name, "run1/t.parquet", "ab/t1.parquet"):
        (tmp_path / other).parent.mkdir(exist_ok=True)
        write_parquet(tmp_path / other, [ROW | {"demonstration": other}])
    (row,) = load_demonstrations(DataConfig(train=name), tmp_path, ["demonstration"])
    assert row.demonstration == name


def test_a_parquet_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    for text in ("one", "two"):
        write_parquet(path, [ROW | {"demonstration": text}])
        os.utime(path, (1, 1))
        (row,) = load_demonstrations(DataConfig(train="train.parquet"), tmp_path, ["demonstration"])
        assert row.demonstration == text


def test_a_parquet_file_needs_no_home(tmp_path: Path) -> None:
    """In a separate process, because libraries read HOME when they are imported."""
    write_parquet(tmp_path / "train.parquet", [ROW])
    (tmp_path / "home").write_text("")  # a file, in which root cannot create a folder either
    code = (
        "from pathlib import Path; from sdft.services.data.rows import parquet_rows; "
        f"print(list(parquet_rows(Path({str(tmp_path / 'train.parquet')!r}))))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    environment["HOME"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout.strip() == str([(1, ROW)]), done.stderr


def test_a_parquet_file_with_two_columns_of_one_name_is_an_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = [pa.array([text]) for text in ("What?", "That.", "This.")]
    table = pa.Table.from_arrays(columns, names=["prompt", "demonstration", "demonstration"])
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train\.parquet: two columns are called demonstration; rename or remove one"):
        load_demonstrations(DataConfig(train="train.parquet"), tmp_path, ["demonstration"])


def test_a_folder_here_is_not_taken_for_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine", ROW)
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.train: mine is not a file in the configuration.s folder, but .*/mine exists"
    ):
        load_demonstrations(DataConfig(train="mine"), tmp_path / "config", ["demonstration"])


def test_a_parquet_file_that_is_cut_in_its_middle_is_an_error(tmp_path: Path) -> None:
    """The end of the file, which describes the columns, is intact."""
    path = tmp_path / "train.parquet"
    write_parquet(path, [ROW | {"demonstration": f"{i} is a number"} for i in range(500)])
    content = path.read_bytes()
    path.write_bytes(content[:20] + b"\xff" * 400 + content[420:])
    with pytest.raises(UserError, match=r"train\.parquet: not a readable Parquet file: .*; write the file again"):
        load_demonstrations(DataConfig(train="train.parquet"), tmp_path, ["demonstration"])


def test_a_damaged_parquet_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"train\.parquet.*Parquet"):
        load_demonstrations(DataConfig(train="train.parquet"), tmp_path, ["demonstration"])


def test_an_unreachable_hub_is_an_error_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants

    # The offline switch of the libraries, so that the test uses no network.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"nobody/no-such-set.*local \.jsonl"):
        load_demonstrations(DataConfig(train="nobody/no-such-set"), tmp_path, ["demonstration"])


def test_questions_need_no_demonstration_but_an_answer(tmp_path: Path) -> None:
    one, two = questions(tmp_path, "exact", {"prompt": "Q", "answer": "A"}, ROW | {"answer": "B"})
    assert (one.demonstration, one.answer) == (None, "A")
    assert (two.demonstration, two.answer) == ("That.", "B")
    with pytest.raises(UserError, match=r"train\.jsonl:1: answer is missing.*answers"):
        questions(tmp_path, "exact", {"prompt": "Q", "answers": "A"})


def test_answers_are_checked_by_the_grader(tmp_path: Path) -> None:
    from sdft.services.grading.graders import GRADERS

    for grader in ("exact", "contains", "choice", "tool_call"):
        reason = GRADERS[grader].check_answer({})
        assert reason is not None
        with pytest.raises(UserError) as e:
            questions(tmp_path, grader, {"prompt": "Q", "answer": {}})
        assert "train.jsonl:1: " in str(e.value)
        assert reason in str(e.value)
