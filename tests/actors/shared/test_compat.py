"""The undocumented names in actors/shared/compat.py: each is in the installed torch."""

import inspect

import pytest
import torch.distributed as dist

from sdft.actors.shared import compat
from tests.canary import Canary, Library, named

TORCH = Library("torch", compat.TORCH, "actors/shared/compat.py", ("torch",))
GLOO, NCCL = "torch.distributed:ProcessGroupGloo", "torch.distributed:ProcessGroupNCCL"

CANARIES: dict[str, Canary] = {
    "ProcessGroupGloo(store, rank, size, options: ProcessGroupGloo._Options)": lambda: (
        "options: torch._C._distributed_c10d.ProcessGroupGloo._Options" in (named(f"{GLOO}.__init__").__doc__ or "")
    ),
    "ProcessGroupGloo._Options._devices": lambda: inspect.isdatadescriptor(named(f"{GLOO}._Options._devices")),
    "ProcessGroupGloo._Options._timeout": lambda: inspect.isdatadescriptor(named(f"{GLOO}._Options._timeout")),
    "ProcessGroupGloo._Options._threads": lambda: inspect.isdatadescriptor(named(f"{GLOO}._Options._threads")),
    "ProcessGroupGloo.create_device(hostname)": lambda: (
        "create_device(hostname: str" in (named(f"{GLOO}.create_device").__doc__ or "")
    ),
}


def test_the_installed_version_is_the_known_one() -> None:
    TORCH.check_version()


@pytest.mark.parametrize("name", CANARIES)
def test_torch_has_the_name(name: str) -> None:
    TORCH.check(name, CANARIES[name])


@pytest.mark.skipif(not dist.is_nccl_available(), reason="torch is built without NCCL")
def test_torch_has_the_name_in_nccl() -> None:
    TORCH.check(
        "ProcessGroupNCCL.Options._timeout", lambda: inspect.isdatadescriptor(named(f"{NCCL}.Options._timeout"))
    )
