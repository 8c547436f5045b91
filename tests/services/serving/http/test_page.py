"""The page of a service in a real browser: what it shows, at two widths, light and dark, and its buttons."""

import asyncio
from pathlib import Path

import pytest

from tests.fakes.browser import CHROMIUM, browser
from tests.fakes.small_service import checked_service, running

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt install chromium)")
HOSTILE = "<img src=x onerror=alert(1)>"


def test_the_page(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model)

    async def run() -> None:
        async with running(service) as client, browser() as page:
            await client.teach("yes", "yes", "yes", HOSTILE)
            await client.release(2)
            await client.settled()
            rows = [{"prompt": HOSTILE, "demonstration": "Ho"}]
            (await client.post("/v1/demonstrations", json=rows)).raise_for_status()
            for width in (1200, 420):
                for dark in (False, True):
                    await page.look(str(client.base_url), width, dark)
                    await page.until("document.body.innerText.includes('serves release 2')")
                    await page.until("document.querySelectorAll('#records tr').length == 6")
                    assert await page.value("document.documentElement.scrollWidth <= innerWidth"), width
                    lightness = await page.value("parseInt(getComputedStyle(document.body).backgroundColor.slice(4))")
                    assert (lightness < 128) == dark
                    await page.picture(tmp_path / f"page-{width}-{dark}.png")
            shown = await page.value("document.body.innerText")
            assert HOSTILE in shown  # as text
            assert await page.value("document.images.length") == 0
            assert "own 100.0 % → 100.0 % (n 40)" in shown
            await page.value("[...document.querySelectorAll('button')].find(b => b.innerText == 'roll back').click()")
            await page.until("document.body.innerText.includes('serves release 1')")
            assert await client.ask("Hi") == "release 1: Hi"
            assert page.complaints == []

    asyncio.run(run())
