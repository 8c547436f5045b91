"""An engine's process of a few lines, for tests of the gateway and the loop: it says which release it has.

    python service_engine.py SETTINGS.json

An answer is "release N: " and the last message. A release whose folder has the file `refused` is refused. The process
does not start while the file that the variable SLOW_ENGINE names exists.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from sdft.actors.shared.process import die_with_parent
from sdft.services.serving.listening import answer, listening_of

SLOW = "SLOW_ENGINE"


def application(settings: dict[str, object]) -> FastAPI:
    app, now = FastAPI(), {"release": settings["release"]}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {}

    @app.post("/sdft/release")
    async def change(request: Request) -> JSONResponse:
        given = await request.json()
        if (Path(given["folder"]) / "refused").exists():
            return JSONResponse({"error": "log-probs differ"}, 500)
        now["release"] = given["release"]
        return JSONResponse({"gap": 0.0})

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request) -> StreamingResponse | JSONResponse:
        given = await request.json()
        name = f"chatcmpl-{request.headers['x-request-id']}"
        text = f"release {now['release']}: {given['messages'][-1]['content']}"
        await asyncio.sleep(given.get("wait_s", 0))
        if not given.get("stream"):
            message = {"role": "assistant", "content": text}
            return JSONResponse({"id": name, "choices": [{"index": 0, "message": message}]})

        async def pieces() -> object:
            for word in text.split(" "):
                delta = {"id": name, "choices": [{"index": 0, "delta": {"content": f"{word} "}}]}
                yield f"data: {json.dumps(delta)}\n\n"
                await asyncio.sleep(given.get("between_s", 0))
            yield "data: [DONE]\n\n"

        return StreamingResponse(pieces(), media_type="text/event-stream")  # type: ignore[arg-type]

    return app


if __name__ == "__main__":
    die_with_parent()
    given = json.loads(Path(sys.argv[1]).read_text())
    while SLOW in os.environ and Path(os.environ[SLOW]).exists():
        time.sleep(0.05)
    asyncio.run(answer(application(given), listening_of(given["listen"])))
