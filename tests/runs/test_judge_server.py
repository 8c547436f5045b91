"""vLLM's own server as a judge."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from sdft.actors.worker import engine_environment
from sdft.services.config.evaluation import JudgeConfig
from sdft.services.grading.judge import check_judge, judged
from tests.actors.vllm.test_engine import engine_settings
from tests.fakes.tiny_judge import make_tiny_judge
from tests.runs.leftovers import new_since, on_machine
from tests.runs.run import ENVIRONMENT, free_port, wait_until


@pytest.mark.whole
def test_a_model_behind_vllms_own_server_judges(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = {"It is Paris.": "yes", "It is Rome.": "no", "paris": "Yes.", "I do not know.": "No, it is not."}
    items = [("What is the capital of France?", "Paris", reply) for reply in replies]
    model = make_tiny_judge(tmp_path, items, list(replies.values()))
    before, port, log = on_machine(), free_port(), tmp_path / "server.log"
    words = f"--model {model} --served-model-name judge --host 127.0.0.1 --port {port} --api-key secret"
    words += " --dtype float32 --enforce-eager --max-model-len 2048 --kv-cache-memory-bytes 50000000"
    words += " --distributed-executor-backend uni"
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words.split()]
    scratch = tmp_path_factory.mktemp("j")  # sockets lie in it, and their paths must be short
    environment = engine_environment(engine_settings(model)) | {
        "VLLM_RPC_BASE_PATH": str(scratch),
        "TMPDIR": str(scratch),
    }
    with log.open("w") as out:
        process = subprocess.Popen(server, env=ENVIRONMENT | environment, stdout=out, stderr=out)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    config = JudgeConfig(url=f"http://127.0.0.1:{port}/v1", model="judge", timeout_s=60)
    try:
        wait_until(lambda: "Application startup complete" in log.read_text(), "vLLM's server was up", process)
        check_judge("q", config)
        assert asyncio.run(judged(config, items)) == [True, False, True, False]
    finally:
        process.terminate()
        process.wait(timeout=60)
        print(log.read_text()[-3000:])
    assert new_since(before) == set()
