"""Shares as people read them."""

import math


def percent(value: float) -> str:
    """A share as people read it: 0.8125 is 81.3 %, a half rounded up."""
    if math.isnan(value):
        return "–"
    return "100 %" if value == 1 else f"{permille(value) / 10:.1f} %"


def permille(value: float) -> int:
    """A share in whole thousandths, a half rounded up, so that a difference agrees with the shares shown beside it."""
    return math.floor(1000 * value + 0.5)
