"""One engine in turns, with a teacher: a window of sdft on the engine that answers, which is killed meanwhile."""

import threading
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from sdft.services.records.rows import StepMetrics, read_rows
from tests.fakes.tiny import make_tiny_model
from tests.runs.service import RunningService, demonstrations, write_service


def engines(service: RunningService) -> list[psutil.Process]:
    """The processes of vLLM's engines below the service."""
    found = []
    for process in psutil.Process(service.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # it ends just now
            if "".join(process.cmdline()).startswith("VLLM::EngineCore"):
                found.append(process)
    return found


class Asking(threading.Thread):
    """Asks without a pause, and keeps what came."""

    def __init__(self, service: RunningService) -> None:
        super().__init__()
        self.service, self.ended = service, threading.Event()
        self.answers: list[tuple[int, str]] = []
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.ended.wait(0.05):
            try:
                self.answers.append(self.service.ask("Say number 3."))
            except (httpx.HTTPError, KeyError) as error:
                self.failures.append(repr(error))


@pytest.mark.whole
def test_students_teacher_and_users_share_an_engine_that_is_killed(tmp_path: Path) -> None:
    serving = {"turns": True, "max_model_len": 512, "max_num_seqs": 8, "kv_cache_gib": 0.1}
    path = write_service(tmp_path, make_tiny_model(tmp_path / "model"), serving=serving)
    config = yaml.safe_load(path.read_text()) | {"method": "sdft", "checkpoint": {"every": 2}}
    path.write_text(yaml.safe_dump(config))
    service = RunningService(path, tmp_path / "runs")
    asking = Asking(service)
    try:
        asking.start()
        service.post("demonstrations", demonstrations())
        service.doing("trains window 1")
        run = service.folder / "windows" / "0001" / "run"
        while not any(row.step >= 5 for row in read_rows(run, StepMetrics)):
            service.check_running()
            assert len(engines(service)) <= 1
            threading.Event().wait(0.1)
        (engine,) = engines(service)
        engine.kill()
        release = service.decided(2)
        assert release["status"] in ("served", "held", "refused"), release
        steps = read_rows(run, StepMetrics)
        assert [row.step for row in steps] == list(range(1, 17))
        assert len(service.get("records/rec-4")["steps"]) == 8  # once in each epoch
        log = (run.parent / "train.log").read_text()
        assert log.count("starting engines and learner") == 1, log  # the run waited for the next engine
    finally:
        asking.ended.set()
        asking.join(60)
        service.close()
    greedy = {text for number, text in asking.answers if number == 1}
    assert len(greedy) == 1
    assert len(asking.answers) > 50
    assert len(asking.failures) <= 1, asking.failures  # the answer that the killed engine had begun
