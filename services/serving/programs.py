"""The programs that a service starts: the process of an engine, and the command `sdft`, for training and export.

Tests of the service's own policy start smaller ones.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Programs:
    """Command lines, to which arguments are added."""

    engine: tuple[str, ...] = (sys.executable, "-m", "sdft.services.serving.engine_process")
    sdft: tuple[str, ...] = (sys.executable, "-m", "sdft.services.cli")
