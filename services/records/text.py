"""Shares formatted for display."""

import math


def percent(value: float) -> str:
    """Format a share as a percentage, halves rounded up: 0.8125 is 81.3 %. NaN is a dash."""
    if math.isnan(value):
        return "–"
    return "100 %" if value == 1 else f"{permille(value) / 10:.1f} %"


def permille(value: float) -> int:
    """Round a share to whole thousandths, halves up, so that differences agree with the shares shown beside them."""
    return math.floor(1000 * value + 0.5)
