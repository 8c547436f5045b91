"""The tutorial in docs/service.md is run block by block, and docs/api.md is made from the program."""

import json
import re
import subprocess
from pathlib import Path

from sdft.services.serving.http.reference import page
from tests.papers.documents import README, ROOT, block, blocks
from tests.runs.run import ENVIRONMENT
from tests.runs.service import RunningService

SERVICE = ROOT / "docs" / "service.md"
CLOSE = ["--set", "service.http.port=0"]  # another service may have the port of the page


def test_the_page_of_the_interface_is_made_from_it() -> None:
    """After a change: python -m sdft.services.serving.http.reference > docs/api.md"""
    assert (ROOT / "docs" / "api.md").read_text() == page()


def test_the_tutorial_does_what_it_says(tiny_model: Path, tmp_path: Path) -> None:
    """Every block is unchanged, except the address, the receipt and the number of records of a window."""
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m").symlink_to(tiny_model)
    (tmp_path / "my.jsonl").write_text(block('{"prompt": "Turn off', README) * 2)
    (tmp_path / "my-test.jsonl").write_text(block('{"prompt": "Light on', README) * 3)
    (tmp_path / "my.yaml").write_text(block("model: smollm2-135m", SERVICE))
    environment = ENVIRONMENT | {"SDFT_CACHE": str(tmp_path / "cache")}

    def run(text: str) -> str:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    small = [*CLOSE, "--set", "dtype=float32", "--set", "service.window={min_records: 3, epochs: 1, held_out: 0.0}"]
    small += [
        "--set",
        "service.serving={kv_cache_gib: 0.1, max_model_len: 1024}",
        "--set",
        "sampling.max_new_tokens=64",
    ]
    assert "sdft serve my.yaml" in blocks(SERVICE)
    service = RunningService(tmp_path / "my.yaml", tmp_path / "runs" / "my", *small, environment=environment)
    try:
        asked, corrected, taught = (
            b.replace("http://127.0.0.1:8000", service.url) for b in blocks(SERVICE) if b.startswith("curl ")
        )
        receipt = json.loads(run(asked))["id"]
        assert json.loads(run(corrected.replace("chatcmpl-...", receipt))) == {"ids": ["rec-0"]}
        assert json.loads(run(taught)) == {"ids": ["rec-1", "rec-2"]}
        assert service.decided(2)["status"] in ("held", "refused", "served")
        shown, listed, audited, *_ = block("sdft status", SERVICE).splitlines()
        assert "service     runs at http://127.0.0.1:" in run(shown)
        assert re.match(r" +2 +(held|refused|served)", run(listed))
        assert "every record is in one state" in run(audited)
        assert service.http.get("/").text.startswith("<!doctype html>")
        token = run(block("sdft tokens", SERVICE)).splitlines()[0]
        assert token.startswith("sdft-")
        assert token not in (tmp_path / "tokens.json").read_text()
    finally:
        service.stop()
        service.close()
