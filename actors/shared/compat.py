"""What the broadcast groups use of torch.distributed that is not documented. Known for the version below.

Each function names what it uses. tests/actors/shared/test_compat.py has one line for each name and fails without it.
"""

from datetime import timedelta

import torch.distributed as dist

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
