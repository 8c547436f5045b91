"""A command whose output has no reader any more, or cannot be written."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest
from rich.console import Console

from sdft.services.base.output import lasting_output
from tests.services.records.test_metrics import write_run

COMMAND = [sys.executable, "-m", "sdft.services.cli"]


def closed_early(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command whose standard output has no reader from the start."""
    words = (*COMMAND, *words)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(words, process.returncode, "", errors)


@pytest.mark.parametrize("command", ["status", "report"])
def test_a_command_whose_reader_has_gone_ends_quietly(command: str, tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    (tmp_path / "config.yaml").write_text("{}\n")
    result = closed_early(command, str(tmp_path))
    assert (result.returncode, result.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["status RUN", "report RUN", "matrix RUN"])
def test_a_command_whose_output_takes_nothing_ends_in_a_sentence(command: str, unbuffered: str, tmp_path: Path) -> None:
    """/dev/full answers as a full disk does."""
    write_run(tmp_path, 3)
    (tmp_path / "config.yaml").write_text(
        "{evaluation: {sets: [{name: tools, role: retention}]}, stages: [{name: one, sets: []}]}"
    )
    (tmp_path / "run.json").write_text('{"stages": [["one", 3]], "state": "finished", "pid": 1, "host": "h"}')
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 0, "stage": 0, "task": "tools", "metric": "accuracy", "value": 0.1, "n": 10}\n')
    words = [*COMMAND, *command.replace("RUN", str(tmp_path)).split()]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            words, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False, env=environment
        )
        both = subprocess.run(words, stdout=full, stderr=full, timeout=60, check=False, env=environment)
    said = "sdft: the output cannot be written (No space left on device); make room, or send it elsewhere\n"
    assert (result.returncode, result.stderr) == (3, said)
    assert both.returncode == 3


def test_a_command_without_standard_output_does_its_work(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    (tmp_path / "config.yaml").write_text("{}\n")
    words = shlex.join([*COMMAND, "report", str(tmp_path)])
    result = subprocess.run(f"{words} >&-", shell=True, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()


def test_another_pipe_that_breaks_is_not_taken_for_the_output() -> None:
    code = (
        "from sdft.services.cli.app import COMMANDS\n"
        "from sdft.services.cli.main import main\n"
        "def broken(run_dir: str): raise BrokenPipeError('a socket')\n"
        "COMMANDS['Look at a run']['status'] = broken\n"
        "main(['status', 'x'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "BrokenPipeError: a socket" in result.stderr


def shown(stdout: int | IO[str]) -> subprocess.Popen[str]:
    """Start a process that shows three notes of a run and prints a last line to standard error."""
    code = (
        "import sys; from rich.console import Console; from sdft.services.base.output import lasting_output\n"
        "from sdft.services.monitoring.console import Progress\n"
        "sys.stdin.readline()\n"
        "with Progress(Console(file=lasting_output()), total_steps=4, title='demo') as progress:\n"
        "    for _ in range(3): progress.note('a note')\n"
        "print('ran to its end', file=sys.stderr)"
    )
    words = [sys.executable, "-u", "-c", code]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_run_goes_on_when_its_output_takes_nothing() -> None:
    """Writing to /dev/full fails as on a full disk."""
    with Path("/dev/full").open("w") as full:
        _, errors = shown(stdout=full).communicate("go\n", timeout=60)
    said = "sdft: the output cannot be written (No space left on device); the work goes on"
    assert errors.splitlines() == [said, "ran to its end"]


def test_a_run_goes_on_when_its_reader_has_gone() -> None:
    process = shown(stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=60)
    said = "sdft: the output cannot be written (Broken pipe); the work goes on"
    assert (process.returncode, errors.splitlines()) == (0, [said, "ran to its end"])


def test_output_that_can_be_written_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    Console(file=lasting_output()).print("a note")
    assert capsys.readouterr().out == "a note\n"
