"""What transports use of torch that is not documented: groups, and GPU memory of another process. Known for the
version below.

Each function names what it uses. tests/actors/shared/test_compat.py has one line for each name and fails without it.
"""

import atexit
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sdft.actors.shared.types import Handle

TORCH = "2.13.0"


def nccl_group(store: dist.Store, rank: int, size: int) -> dist.Backend:
    """One member of an NCCL group. Uses ProcessGroupNCCL.Options._timeout.

    Torch's watchdog ends the process when it fires. A timeout of a day keeps BroadcastGroup's deadlines ahead of it.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)
    return dist.ProcessGroupNCCL(store, rank, size, options)


def gloo_group(store: dist.Store, rank: int, size: int, address: str, limit: timedelta) -> dist.Backend:
    """One member of a gloo group. Uses ProcessGroupGloo._Options: _devices, _timeout and _threads.

    The constructor without options takes the address that the machine's own name resolves to, which other machines may
    not reach.
    address: address of this member's machine, at which the others connect to it.
    """
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout, options._threads = limit, 1
    return dist.ProcessGroupGloo(store, rank, size, options)


def share(memory: torch.Tensor) -> Handle:
    """Return a handle by which other processes of this machine open a tensor's GPU memory. Call it once for a tensor.

    Uses UntypedStorage._share_cuda_, as torch.multiprocessing.reductions does. Its first value is the device, a number
    in this process only, and its last whether a reader waits for an event: ours waits for this process instead.

    Torch counts the readers in a file of /dev/shm, which a killed process would leave behind. So its name is removed.
    A reader ignores that the file is gone; torch then never frees the memory, which stays until this process ends. At a
    clean exit torch itself removes the name, and its destructor aborts the process if there is none.
    """
    _, *handle, _ = memory.untyped_storage()._share_cuda_()
    counter = Path("/dev/shm") / handle[3].decode().lstrip("/")
    counter.unlink(missing_ok=True)
    atexit.register(counter.touch)
    return tuple(handle)


def opened(handle: Handle, device: torch.device) -> torch.Tensor:
    """Return the memory of a handle, [nbytes] uint8, for use on a device. It is closed with the last tensor on it.

    Uses UntypedStorage._new_shared_cuda. The memory may be on another GPU, also on one that this process does not see.
    Raises RuntimeError if this process or the GPU cannot reach it, or if the process that shared it has ended.
    """
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *handle, False)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
