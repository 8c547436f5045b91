"""docs/environments.md: its class plays, its configuration and its row are taken."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sdft.services.config.data import DataConfig
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.data.demonstrations import load_demonstrations
from sdft.services.environments.base import Done
from sdft.services.environments.pool import Environments
from tests.papers.documents import ROOT, block

PAGE = ROOT / "docs" / "environments.md"


def test_the_class_plays_as_it_is_configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_house.py").write_text(PAGE.read_text().partition("```python\n")[2].partition("```")[0])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    settings = yaml.safe_load(block("data: {train: tasks.jsonl, template: turn, max", PAGE))["environment"]
    record: dict[str, Any] = json.loads(block('{"prompt": "Turn on', PAGE))

    async def run() -> list[Any]:
        environments = Environments(EnvironmentConfig.model_validate(settings))
        try:
            async with environments.room(1):
                episode = await environments.begin(record)
                return [await episode.step(m["content"]) for m in record["demonstration"] if m["role"] == "assistant"]
        finally:
            await environments.stop()

    first, last = asyncio.run(run())
    assert first == [{"role": "user", "content": record["demonstration"][1]["content"]}]
    assert last == Done(True, "the lights in ['hall'] are on, not in ['hall']")
    assert "my_house" not in sys.modules, "it is imported in the environment's process only"


def test_the_row_is_taken(tmp_path: Path) -> None:
    (tmp_path / "tasks.jsonl").write_text(block('{"prompt": "Turn on', PAGE) + "\n")
    (record,) = load_demonstrations(DataConfig(train="tasks.jsonl"), tmp_path, ["demonstration"])
    assert isinstance(record.demonstration, tuple)
    assert [message["role"] for message in record.demonstration] == ["assistant", "user", "assistant"]
