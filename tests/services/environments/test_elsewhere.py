"""Environments with an interpreter of their own, which has neither this project nor what it needs."""

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.config.run import RunConfig
from sdft.services.environments.base import Done
from sdft.services.environments.child import EpisodeLost
from sdft.services.environments.pool import Environments
from sdft.services.planning.engines import check_environments

OWN = """
import importlib.util
import own_package
from sdft.services.environments.base import Done, Dropped, Environment

class House(Environment):
    def __init__(self, rooms):
        self.rooms = rooms
    async def step(self, reply):
        if reply == "leave":
            raise Dropped("the house is gone")
        if reply == "packages":
            return " ".join(name for name in ("numpy", "pydantic", "ray") if importlib.util.find_spec(name)) or "none"
        return Done(passed=reply == own_package.WORD, feedback=f"{len(self.rooms)} rooms")
"""


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter without any package but `own_package`."""
    folder = tmp_path_factory.mktemp("own")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "own_package.py").write_text("WORD = 'open'")
    (packages / "own_house.py").write_text(OWN)
    return folder / "bin" / "python"


def environment(python: Path, settings: dict[str, Any]) -> EnvironmentConfig:
    given = {"type": "own_house:House", "settings": {"rooms": ["hall"]}, "python": str(python)}
    return EnvironmentConfig.model_validate(given | settings)


def test_it_has_its_own_packages_and_none_of_the_runs(interpreter: Path) -> None:
    async def run() -> list[Any]:
        environments, found = Environments(environment(interpreter, {})), list[Any]()
        try:
            for replies in (["packages", "open"], ["shut"], ["leave"]):
                episode = await environments.begin({"prompt": [], "id": "a"})
                try:
                    found += [await episode.step(reply) for reply in replies]
                except EpisodeLost as lost:
                    found.append(str(lost))
                await episode.close()
        finally:
            await environments.stop()
        return found

    nothing = [{"role": "user", "content": "none"}]
    assert asyncio.run(run()) == [nothing, Done(True, "1 rooms"), Done(False, "1 rooms"), "the house is gone"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, None),
        ({"settings": {}}, "missing 1 required positional argument: 'rooms'"),
        ({"type": "own_hous:House"}, "own_hous:House cannot be imported (ModuleNotFoundError: No module named"),
        ({"type": "verifiers", "settings": {"environment": "wordle"}}, "install verifiers<0.4 in an environment of"),
        ({"type": "own_package:WORD"}, "own_package:WORD is not a subclass of sdft.services.environments.base"),
        ({"python": "nowhere/python"}, "environment.python: nowhere/python cannot be started (No such file or dir"),
    ],
)
def test_the_check_of_a_configuration_asks_the_interpreter(
    interpreter: Path, settings: dict[str, Any], sentence: str | None
) -> None:
    given = {
        **{"model": "m", "data": {"train": "t.jsonl"}, "training": {"steps": 1}, "sampling": {"max_new_tokens": 8}},
        "environment": environment(interpreter, settings).model_dump(),
    }
    config = RunConfig.model_validate(given)
    if sentence is None:
        check_environments(config)
        return
    with pytest.raises(UserError) as error:
        check_environments(config)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
