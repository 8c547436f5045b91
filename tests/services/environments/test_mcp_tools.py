"""The tools of a real MCP server, in the process of an environment."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments.base import Done
from sdft.services.environments.child import EpisodeLost
from sdft.services.environments.mcp_tools import McpTools
from sdft.services.environments.pool import Environments

SERVER = [sys.executable, str(Path(__file__).parents[2] / "fakes" / "mcp_server.py")]
RECORD = {"id": "row-1", "prompt": [{"role": "user", "content": "Add."}], "answer": "7", "tools": None}


def action(name: str, arguments: str) -> str:
    return f"Action: {name}\nAction Input: {arguments}"


def tool(name: str, content: str) -> dict[str, str]:
    return {"role": "tool", "name": name, "content": content}


def played(*episodes: list[str], **settings: Any) -> list[list[Any]]:
    """Return what answers each reply of the episodes, which go on at the same time."""
    given = {"type": "mcp", "settings": {"command": SERVER} | settings, "step_timeout_s": 20, "max_answer_chars": 60}

    async def one(environments: Environments, replies: list[str]) -> list[Any]:
        episode = await environments.begin(RECORD)
        try:
            return [await episode.step(reply) for reply in replies]
        finally:
            await episode.close()

    async def run() -> list[list[Any]]:
        environments = Environments(EnvironmentConfig.model_validate(given))
        try:
            return await asyncio.gather(*(one(environments, replies) for replies in episodes))
        finally:
            await environments.stop()

    return asyncio.run(run())


def test_episodes_call_tools_of_servers_of_their_own() -> None:
    two = "\n".join([action("add", '{"number": 4}'), action("add", '{"number": 1}')])
    first, second = played(
        [action("add", '{"number": 3}'), two, "It is 8."], [action("add", '{"number": 7}'), "It is 7."]
    )
    assert first[0] == [tool("add", "the total is 3")]
    assert first[1] == [tool("add", "the total is 7"), tool("add", "the total is 8")]
    assert first[2] == Done(False, "the answer was 'It is 8.'")
    assert second == [[tool("add", "the total is 7")], Done(True, "the answer was 'It is 7.'")]


def test_what_goes_wrong_is_an_answer() -> None:
    (answers,) = played(
        [action("fail", "{}"), action("flood", "{}"), action("nothing", "{}"), action("add", "seven"), "7"]
    )
    failed, flooded, unknown, unread, done = answers
    assert failed == [tool("fail", "Error executing tool fail")]
    assert flooded == [tool("flood", "x" * 60 + "\n[cut: the answer has 50000 characters]")]
    assert "nothing" in unknown[0]["content"]
    assert unread == [{"role": "user", "content": "the input of a call is not a JSON object"}]
    assert done == Done(True, "the answer was '7'")


def test_a_server_that_does_not_start_loses_its_episodes() -> None:
    with pytest.raises(EpisodeLost, match="reset failed: "):
        played(["7"], command=[sys.executable, "-c", "raise SystemExit(3)"])


def test_a_parser_of_vllm_finds_the_calls(tiny_model: Path) -> None:
    call = '<tool_call>\n{"name": "add", "arguments": {"number": 7}}\n</tool_call>'
    ((first, last),) = played([f"I add.\n{call}", "7"], parser="hermes", model=str(tiny_model))
    assert first == [tool("add", "the total is 7")]
    assert last == Done(True, "the answer was '7'")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"command": "python server.py"}, "command must be a list of words"),
        ({"command": ["x"], "grader": "perplexity"}, "grader must be one of exact, "),
        ({"command": ["x"], "parser": "hermes"}, "parser and model go together"),
        ({"command": ["x"], "model": "m"}, "parser and model go together"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        McpTools(**settings)
