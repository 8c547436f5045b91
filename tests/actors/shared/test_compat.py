"""The undocumented names in actors/shared/compat.py: each is in the installed torch."""

import inspect

import pytest
import torch.distributed as dist

from sdft.actors.shared import compat
from tests.canary import Canary, Library, mentions, named

TORCH = Library("torch", compat.TORCH, "actors/shared/compat.py", ("torch",))
REDUCTIONS = "torch.multiprocessing.reductions"
SHARED = (
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
    "event_sync_required",
)
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
    "UntypedStorage._share_cuda_()": lambda: inspect.ismethoddescriptor(named("torch:UntypedStorage._share_cuda_")),
    "its values in the order that compat.share takes them": lambda: (
        mentions(f"{REDUCTIONS}:reduce_tensor", "_share_cuda_")
        and in_order(named(f"{REDUCTIONS}:reduce_tensor").__code__.co_varnames, ("device", "handle", *SHARED))
    ),
    "UntypedStorage._new_shared_cuda(device, ...)": lambda: (
        inspect.isbuiltin(named("torch:UntypedStorage._new_shared_cuda"))
        and mentions(f"{REDUCTIONS}:rebuild_cuda_tensor", "_new_shared_cuda")
    ),
    "its parameters in the order that compat.opened gives them": lambda: in_order(
        tuple(inspect.signature(named(f"{REDUCTIONS}:rebuild_cuda_tensor")).parameters),
        ("storage_device", "storage_handle", *SHARED),
    ),
}


def in_order(names: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    """Whether all these names are there, and in this order."""
    return tuple(name for name in names if name in wanted) == wanted


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
