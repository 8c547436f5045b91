"""The process of an engine that answers requests: vLLM's OpenAI server, and the change of its weights.

    python -m sdft.services.serving.engine_process SETTINGS.json

    POST /sdft/release {"release": 3, "folder": ..., "files": {name: digest}}
        files of the folder ─► digests ─► snapshot, with the probe's log-probs by transformers ─► engine, verified

The weights that the engine starts with are verified in the same way. With EngineSettings.shared the engine also works
for a window's run, in turns with the requests (turns/). The process ends with its parent, and when the engine's own
process dies.
"""

import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from sdft.actors.config import EngineSettings
from sdft.actors.shared.model_files import read_header, weight_files
from sdft.actors.shared.process import die_with_parent, large_imports, scratch_folder
from sdft.actors.worker import engine_environment
from sdft.services.base.digests import differing
from sdft.services.serving.listening import Listening, answer, listening_of
from sdft.services.serving.turns.server import PATH, RELEASE, InTurn, Owners, turn_route

if TYPE_CHECKING:
    import torch

    from sdft.actors.vllm.engine import VllmEngine
    from sdft.learner.weights.publisher import Publisher

PROBE_TEXT = (
    "Name the days of the week, the months of the year, and a city by the sea. Monday is a day, May a month. "
    "The quick brown fox jumps over the lazy dog, and 12 times 12 is 144. Water boils at 100 degrees Celsius."
)
PROBE_TOKENS = 48
ALIVE_EVERY_S = 0.5


@dataclass(frozen=True)
class EngineProcessSettings:
    """What the parent passes on."""

    engine: EngineSettings
    listen: Listening
    name: str  # of the model in requests
    tool_parser: str | None
    release: int
    files: dict[str, str]  # digests of the release's files

    @classmethod
    def read(cls, path: Path) -> "EngineProcessSettings":
        given = json.loads(path.read_text())
        engine, listen = given.pop("engine"), listening_of(given.pop("listen"))
        return cls(EngineSettings(**engine | {"stop_ids": tuple(engine["stop_ids"])}), listen, **given)


class NotWhole(Exception):
    """Files of a release differ from their digests."""


class Releases:
    """Loads releases into the engine."""

    def __init__(self, engine: "VllmEngine", publisher: "Publisher", release: int, dtype: "torch.dtype") -> None:
        self._engine, self._publisher, self._dtype = engine, publisher, dtype
        self._changing = asyncio.Lock()
        self.owners = Owners(engine, lambda pool, folder: self._snapshot(pool, 0, folder), publisher.forget)
        self.release = release

    async def verify_loaded(self, folder: Path) -> float:
        """Compare the engine with transformers: as loaded, unless it is shared, and updated to the same weights.

        Returns the gap.
        """
        snapshot = await asyncio.to_thread(self._snapshot, RELEASE, 0, folder)
        gap = (await self._engine.update_weights(snapshot)).probe_gap
        await self._engine.client.update_weight_version(str(self.release))
        self.owners.keep(RELEASE, replace(snapshot, version=self.release), loaded=True)
        return gap

    async def change(self, release: int, folder: Path, files: dict[str, str]) -> dict[str, Any]:
        """Load and verify a release. Raises NotWhole, without a change, if its files are not whole."""
        async with self._changing:
            damaged = await asyncio.to_thread(differing, folder, files)
            if damaged:
                raise NotWhole(f"{folder} is not whole: {damaged}")
            async with self.owners.packing:
                self.owners.keep(RELEASE, await asyncio.to_thread(self._snapshot, RELEASE, release, folder))
            report = await self.owners.loaded(RELEASE)
            self.release = release
            return {"release": release, "gap": report.probe_gap, "pause_s": report.pause_s}

    def _snapshot(self, role: str, version: int, folder: Path) -> Any:
        from sdft.learner.weights.content import Content

        count = sum(
            math.prod(entry["shape"]) for path in weight_files(folder) for entry in read_header(path)[0].values()
        )
        return self._publisher.publish(role, version, Content(self._tensors(folder), count * self._dtype.itemsize))

    def _tensors(self, folder: Path) -> "Iterator[tuple[str, torch.Tensor]]":
        from safetensors import safe_open

        for path in weight_files(folder):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name).to(self._dtype)


async def serve(settings: EngineProcessSettings) -> None:
    """Start the engine, verify it, and answer until the engine dies."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from sdft.actors.vllm.engine import VllmEngine
    from sdft.actors.vllm.openai_app import openai_app
    from sdft.learner.weights.publisher import Publisher

    folder = Path(settings.engine.model)
    damaged = differing(folder, settings.files)
    if damaged:
        raise SystemExit(f"release {settings.release}: {folder} is not whole: {damaged}")
    engine = VllmEngine(settings.engine)
    await engine.start()
    try:
        ids = AutoTokenizer.from_pretrained(folder, local_files_only=True).encode(PROBE_TEXT)[:PROBE_TOKENS]
        dtype = getattr(torch, settings.engine.dtype)
        probe = np.asarray(ids, np.int32)
        publisher = Publisher(folder, dtype, probe, "", settings.engine.vocabulary)
        releases = Releases(engine, publisher, settings.release, dtype)
        gap = await releases.verify_loaded(folder)
        print(f"release {settings.release} is loaded and verified (gap {gap:.1e})", flush=True)
        app = await openai_app(engine, settings.name, settings.tool_parser)
        _add_change(app, releases)
        if settings.engine.shared:
            app.add_route(PATH, turn_route(releases.owners), methods=["POST"])
        answers = InTurn(app, releases.owners.turns) if settings.engine.shared else app
        answering = asyncio.create_task(answer(answers, settings.listen), name="answer requests")
        while not engine.dead and not answering.done() and releases.owners.broken is None:
            await asyncio.wait([answering], timeout=ALIVE_EVERY_S)
    finally:
        engine.stop()
    if engine.dead:
        raise SystemExit("vLLM's own process has died")
    if (error := releases.owners.broken) is not None:
        raise SystemExit(f"the weights of the release cannot be loaded: {type(error).__name__}: {error}")


def _add_change(app: FastAPI, releases: Releases) -> None:
    async def change(request: Request) -> JSONResponse:
        given = await request.json()
        try:
            made = await releases.change(given["release"], Path(given["folder"]), given["files"])
        except NotWhole as error:
            return JSONResponse({"error": str(error)}, status_code=409)
        except Exception as error:  # noqa: BLE001 - whatever it is, these weights are not served
            return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=500)
        return JSONResponse(made)

    app.add_api_route("/sdft/release", change, methods=["POST"])


def main() -> None:
    die_with_parent()
    settings = EngineProcessSettings.read(Path(sys.argv[1]))
    with ExitStack() as scratch:
        names = scratch.enter_context(scratch_folder("sdft-serving-"))
        os.environ.update(engine_environment(settings.engine) | {"VLLM_RPC_BASE_PATH": str(names)})
        with large_imports():
            asyncio.run(serve(settings))


if __name__ == "__main__":
    main()
