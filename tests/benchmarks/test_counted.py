"""The counted cost of a learner's micro-batch on a GPU: what docs/benchmarks.md says of 1.5B holds."""

from benchmarks.counted import bound_s, count


def test_a_micro_batch_at_1_5b_launches_at_most_1000_kernels_near_its_bound() -> None:
    counting = count("1.5b", 8192, fused=True)
    assert sum(part.kernels for part in counting.parts.values()) <= 1000
    assert sum(part.floor_s for part in counting.parts.values()) <= 1.25 * bound_s("1.5b", 8192)


def test_plain_layers_launch_more_and_move_more() -> None:
    """Otherwise the fused layers would not be counted."""
    plain, fused = (count("0.5b", 2048, fused=fused).parts for fused in (False, True))
    for part in ("forward", "backward"):
        assert plain[part].kernels > 1.8 * fused[part].kernels
        assert plain[part].bytes > 1.2 * fused[part].bytes
