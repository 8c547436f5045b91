"""What engine and learner processes set up before they import torch. Imports nothing but the standard library."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Idle OpenMP threads that spin make two processes on the same cores 30 times slower than one.
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


@contextmanager
def large_imports() -> Iterator[None]:
    """Import thousands of modules in it: a fifth faster, for the garbage collector does not walk them meanwhile.

    They stay out of its sight afterwards too, for they stay until the process ends.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
