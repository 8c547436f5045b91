"""examples/agent: its home grades the exact final state, and its data are what the home plays."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from examples.agent.home import ROOMS, SYSTEM, TOOLS, Home
from sdft.services.config.load import load_config
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.environments.base import Answer, Done
from tests.papers.documents import ROOT

FOLDER = ROOT / "examples" / "agent"
ROWS: dict[str, list[dict[str, Any]]] = {
    split: [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]
    for split in ("train", "heldout")
}
EVERY = [row for rows in ROWS.values() for row in rows]
ANSWER = {
    "events": {"Budget": ["14:30", "office"]},
    "people": {"Anna": "kitchen"},
    "wanted": {"alarm": "14:30", "office light": 40},
}
RIGHT = ["look(Budget)", "setLight(office, 40)", "setAlarm(14:30)", "Done."]


def play(answer: dict[str, Any], replies: Sequence[str]) -> list[Answer | Done]:
    """Return what the home says to each reply."""

    async def run() -> list[Answer | Done]:
        home = Home()
        await home.reset({"answer": answer})
        return [await home.step(reply) for reply in replies]

    return asyncio.run(run())


def passed(answer: dict[str, Any], replies: Sequence[str]) -> bool:
    end = play(answer, replies)[-1]
    return isinstance(end, Done) and end.passed


def request(row: dict[str, Any]) -> str:
    system, user = row["prompt"]
    assert system == {"role": "system", "content": SYSTEM}
    return str(user["content"])


def own(row: dict[str, Any]) -> list[str]:
    """Return the replies of a demonstration."""
    return [message["content"] for message in row["demonstration"] if message["role"] == "assistant"]


def wording(row: dict[str, Any]) -> str:
    """Return the request without its values."""
    return re.sub("|".join(rf"\b{re.escape(value)}\b" for value in sorted(values(row))), "_", request(row))


def values(row: dict[str, Any]) -> set[str]:
    """Return every name, title, room, time and number of a row."""
    answer, used = row["answer"], set[str]()
    for title, (time, room) in answer["events"].items():
        used |= {title, time, room}
    used |= answer["people"].keys() | {str(value) for value in answer["wanted"].values()}
    return used


def test_the_data_are_made_again_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "examples.agent.make_data", tmp_path], cwd=ROOT, check=True, timeout=60)
    committed = {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed


def test_every_demonstration_is_what_the_home_plays_and_passes() -> None:
    for row in EVERY:
        *said, end = play(row["answer"], own(row))
        assert end == Done(True), row["id"]
        assert said == [m["content"] for m in row["demonstration"] if m["role"] == "user"], row["id"]


def test_no_demonstration_passes_without_one_of_its_changes_or_with_another_one() -> None:
    for row in EVERY:
        _, *changes, end = own(row)
        assert 1 <= len(changes) <= 2
        for i in range(len(changes)):
            assert not passed(row["answer"], [*changes[:i], *changes[i + 1 :], end]), row["id"]
        for other in ("setAlarm(23:59)", "setLight(attic, 1)", "setHeating(office, 29)", "playSong(garage, Silence)"):
            assert not passed(row["answer"], [*changes, other, end]), row["id"]


def test_what_the_first_call_returns_is_needed_and_not_in_the_request() -> None:
    for row in EVERY:
        found = {request(row).find(word) for word in (*ROOMS, *(time for time, _ in row["answer"]["events"].values()))}
        assert found == {-1}, row["id"]
        look, *changes, _ = own(row)
        assert look.startswith("look(")
        assert look[5:-1] in request(row)
        answered = row["demonstration"][1]["content"].removesuffix(".")
        for change in changes:
            assert any(word in answered.split() for word in re.findall(r"[\w:]+", change)), row["id"]


def test_held_out_requests_share_neither_wordings_nor_values_with_training() -> None:
    assert {split: len(rows) for split, rows in ROWS.items()} == {"train": 140, "heldout": 70}
    assert len({row["id"] for row in EVERY}) == len({request(row) for row in EVERY}) == len(EVERY)
    train, heldout = ({wording(row) for row in rows} for rows in ROWS.values())
    assert not train & heldout
    train, heldout = (set().union(*map(values, rows)) for rows in ROWS.values())
    assert not train & heldout


@pytest.mark.parametrize(
    "replies",
    [
        ["Done."],
        [""],
        ["Sure! setLight(office, 40)", *RIGHT],
        [*RIGHT[:2], "Done."],
        ["look(Budget)", "setLight(kitchen, 40)", *RIGHT[2:]],
        ["look(Budget)", "setLight(office, 60)", *RIGHT[2:]],
        [*RIGHT[:3], "setLight(kitchen, 40)", "Done."],
        [*RIGHT[:3], "setAlarm(14:00)", "Done."],
    ],
)
def test_a_wrong_play_does_not_pass(replies: list[str]) -> None:
    said = play(ANSWER, replies)
    end = next(answer for answer in said if isinstance(answer, Done))
    assert not end.passed
    assert end.feedback


def test_a_right_play_passes_also_in_another_order_and_after_a_mended_mistake() -> None:
    assert passed(ANSWER, RIGHT)
    assert passed(
        ANSWER, ["setAlarm(14:30)", "setLight(kitchen)", "setLight(office, 4)", " setLight(office,40)\n", "Ok"]
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("look(Anna)", "Anna is in the kitchen."),
        ("look(Ben)", "There is no person or event Ben."),
        ("open(door)", "There is no tool open."),
        ("setLight(office)", "Call setLight(room, percent)."),
        ("setLight(40, office)", "There is no room 40."),
        ("setLight(office, 101)", "101 is no number from 0 to 100."),
        ("setLight(office, ²)", "² is no number from 0 to 100."),
        ("setHeating(office, -5)", "-5 is no number from 5 to 30."),
        ("setAlarm(24:00)", "24:00 is no time."),
        ("setAlarm()", "Call setAlarm(time)."),
    ],
)
def test_the_home_answers_a_call(call: str, said: str) -> None:
    (answer,) = play(ANSWER, [call])
    assert answer == f"Result: {said}"


def test_a_row_that_wants_a_device_which_the_home_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="the home has no cellar light"):
        play({**ANSWER, "wanted": {"cellar light": 1}}, [])


def test_the_system_message_names_the_tools_of_the_home() -> None:
    named = re.findall(r"^(\w+)\((.*?)\)", SYSTEM, re.MULTILINE)
    assert dict(named) == {name: ", ".join(parameters) for name, (parameters, _) in TOOLS.items()}


def test_every_demonstration_fits_the_limits_of_an_episode(smollm2: Path) -> None:
    config, tokenizer = load_config(FOLDER / "agent.yaml"), load_tokenizer(smollm2)
    assert config.environment is not None
    between = len(tokenizer("<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n").input_ids)
    for row in EVERY:
        lengths = [len(tokenizer(message["content"]).input_ids) + 1 for message in row["demonstration"]]
        assert max(lengths[::2]) <= config.sampling.max_new_tokens
        assert len(lengths[::2]) <= config.environment.max_turns
        used = sum(lengths[:-1]) + between * (len(lengths) // 2)
        assert used + config.sampling.max_new_tokens <= config.environment.max_tokens
