"""A command reads tokenizers without torch, whose import takes longer than all other work of the command."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdft.services.data.without_torch import import_for_tokenizers
from tests.runs.run import write_run

CHECK = """
import sys
from sdft.services.cli.main import main
sys.argv = ["sdft", "check", sys.argv[1]]
code = main()
there = "torch" in sys.modules
import torch
print(code, there, torch.ones(2).sum().item())
"""


def test_check_imports_no_torch_and_leaves_it_importable(tiny_model: Path, tmp_path: Path) -> None:
    config = write_run(tmp_path, tiny_model, "float32")
    command = [sys.executable, "-c", CHECK, str(config)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 False 2.0"
    assert "PyTorch was not found" not in done.stdout + done.stderr


def test_torch_is_not_hidden_without_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with import_for_tokenizers():
        assert "torch" not in sys.modules  # neither imported nor marked as missing
