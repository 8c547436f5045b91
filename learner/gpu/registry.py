"""Registers a class as an operation of torch, in the namespace `sdft`.

CUDA   one kernel each (kernels.py)
CPU    the plain formula, for comparisons
Meta   shapes only, so that a step's operations can be counted without a GPU
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import TypeVar

import torch

K = TypeVar("K", bound=type)
LIBRARY = torch.library.Library("sdft", "FRAGMENT")
ELEMENTS = 4096  # of a program of an elementwise kernel


def operation(schema: str) -> Callable[[K], K]:
    """Register a class with the static methods cuda, cpu and meta as one operation."""

    def register(kind: K) -> K:
        name = schema[: schema.index("(")]
        LIBRARY.define(schema)
        for key in ("CUDA", "CPU", "Meta"):
            LIBRARY.impl(name, getattr(kind, key.lower()), key)
        return kind

    return register


@cache
def kernels() -> ModuleType:
    """The kernels, which need Triton."""
    from sdft.learner.gpu import kernels as found

    return found
