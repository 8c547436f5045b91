"""Headless Chromium, driven through its DevTools protocol."""

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium")
# Without background services: they look for hosts on the internet at every start.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0"),
)
START_S, WAIT_S = 60, 30


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.complaints: list[str] = []  # errors on the page's console

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol. Dialogs are accepted, and errors of the console noted, meanwhile."""
        number = next(self._ids)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        async with asyncio.timeout(WAIT_S):
            while True:
                message = json.loads(await self._socket.receive_str())
                if message.get("id") == number:
                    return message["result"]
                if message.get("method") == "Page.javascriptDialogOpening":
                    accept = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                    await self._socket.send_json(accept)
                entry = message.get("params", {}).get("entry", {})
                if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in ("error", "warning"):
                    self.complaints.append(json.dumps(message["params"])[:500])

    async def value(self, script: str) -> Any:
        """Return the value of a script."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return found["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until the value of a script is true."""
        deadline = time.monotonic() + WAIT_S
        while not await self.value(script):
            assert time.monotonic() < deadline, await self.value("document.body.innerText")
            await asyncio.sleep(0.1)

    async def look(self, url: str, width: int, dark: bool) -> None:
        """Open a page at a width, light or dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call("Page.navigate", url=url)

    async def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        import base64

        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Run Chromium with one tab."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True) as profile:
        place = Path(profile) / "DevToolsActivePort"
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_S
            while not place.exists() or not place.read_text().strip():
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            port = int(place.read_text().splitlines()[0])
            async with aiohttp.ClientSession() as http:
                async with http.get(f"http://127.0.0.1:{port}/json") as reply:
                    tab = next(t for t in await reply.json() if t["type"] == "page")
                async with http.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    yield page
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its helpers write into the profile
            process.wait()
