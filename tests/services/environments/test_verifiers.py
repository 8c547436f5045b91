"""Environments of the library `verifiers`, with the library itself in an environment of its own."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sdft.actors.shared.own_code import NotImportable
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.environments.base import Done
from sdft.services.environments.child import EpisodeLost
from sdft.services.environments.pool import Environments
from sdft.services.environments.verifiers_environment import Verifiers
from tests.papers.documents import ROOT
from tests.services.environments.test_pool import user

PYTHON = ROOT / ".venv" / "verifiers" / "bin" / "python"  # made by `make whole`
ROW = {"id": "row-1", "prompt": [{"role": "user", "content": "Guess."}], "answer": "5"}


def played(*replies: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Any]:
    """Return what answers each reply of an episode; the reason at the end, if it is dropped."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "fakes"))
    given = {"environment": "guessing"} | settings
    config = EnvironmentConfig(type="verifiers", settings=given, python=str(PYTHON), step_timeout_s=60)

    async def run() -> list[Any]:
        environments, found = Environments(config), list[Any]()
        try:
            episode = await environments.begin(ROW)
            try:
                found += [await episode.step(reply) for reply in replies]
            finally:
                await episode.close()
        except EpisodeLost as lost:
            found.append(str(lost))
        finally:
            await environments.stop()
        return found

    return asyncio.run(run())


@pytest.mark.whole
@pytest.mark.skipif(not PYTHON.exists(), reason="`make whole` installs verifiers")
@pytest.mark.parametrize(
    ("replies", "settings", "answers"),
    [
        (["6", "5"], {}, [user("warm"), Done(True, "reward 1")]),
        (["1", "2", "3"], {}, [user("cold"), user("cold"), Done(False, "reward 0.25")]),
        (["1", "2", "3"], {"passes_at": 0.2}, [user("cold"), user("cold"), Done(True, "reward 0.25")]),
        (["rewrite"], {}, ["verifiers: the environment rewrites earlier messages, and sampled tokens cannot change"]),
        (
            ['<tool_call>{"name": "double", "arguments": {"number": 4}}</tool_call>', "It is 5, not 8."],
            {"arguments": {"tools": True}},
            [[{"role": "tool", "content": "8", "tool_call_id": "call_0"}], Done(True, "reward 1")],
        ),
    ],
)
def test_an_episode_is_a_rollout_of_the_library(
    replies: list[str], settings: dict[str, Any], answers: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert played(*replies, monkeypatch=monkeypatch, **settings) == answers


@pytest.mark.whole
@pytest.mark.skipif(not PYTHON.exists(), reason="`make whole` installs verifiers")
def test_an_error_of_the_environment_drops_the_episode_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    (why,) = played("crash", monkeypatch=monkeypatch)
    assert why.startswith("verifiers: ")
    assert "the game is broken" in why


def test_without_the_library_the_environment_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(
        NotImportable, match=r"install verifiers<0\.4 in an environment of its own, and set environment"
    ):
        Verifiers("guessing")
