"""The number of engines that a pool should have."""

from sdft.services.fleet.autoscaler import FASTEST, IN_A_ROW_GROW, IN_A_ROW_SHRINK, Scaler, Seen

MISSED = Seen(waited=0.5, busy=1.0, queued=7)
SPARE = Seen(waited=0.0, busy=0.2, queued=0)
RIGHT = Seen(waited=0.05, busy=0.7, queued=0)


def after(scaler: Scaler, size: int, *steps: Seen) -> list[int]:
    """Return the size after each step, if the pool follows at once."""
    sizes = []
    for seen in steps:
        size = scaler.wanted(size, seen)
        sizes.append(size)
    return sizes


def test_a_pool_that_the_learner_waits_for_grows_by_what_is_missing() -> None:
    assert after(Scaler(1, 100), 10, *[MISSED] * IN_A_ROW_GROW)[-1] == 20
    a_little = Seen(waited=0.2, busy=1.0, queued=1)
    assert after(Scaler(1, 100), 10, *[a_little] * IN_A_ROW_GROW)[-1] == 13  # 10 / 0.8
    starved = Seen(waited=0.99, busy=1.0, queued=1)
    assert after(Scaler(1, 100), 10, *[starved] * IN_A_ROW_GROW)[-1] == 10 * FASTEST


def test_one_step_changes_nothing_and_every_change_needs_new_steps() -> None:
    scaler = Scaler(1, 100)
    assert after(scaler, 4, MISSED, RIGHT, MISSED, RIGHT, MISSED) == [4] * 5
    assert after(scaler, 4, MISSED, MISSED, MISSED) == [8, 8, 16]


def test_a_pool_with_little_to_do_shrinks_to_what_it_uses_but_slowly() -> None:
    assert after(Scaler(1, 100), 10, *[SPARE] * IN_A_ROW_SHRINK) == [10] * (IN_A_ROW_SHRINK - 1) + [3]  # 10 * .2 / .7


def test_a_pool_with_room_does_not_grow_while_the_learner_waits() -> None:
    """The learner waits for the other pool."""
    assert after(Scaler(1, 100), 4, *[Seen(waited=0.6, busy=0.3, queued=0)] * 9) == [4] * 9


def test_a_pool_keeps_within_its_bounds() -> None:
    assert after(Scaler(2, 12), 10, *[MISSED] * IN_A_ROW_GROW)[-1] == 12
    assert after(Scaler(6, 12), 10, *[SPARE] * IN_A_ROW_SHRINK)[-1] == 6
    assert Scaler(3, 12).wanted(1, RIGHT) == 3
    assert Scaler(3, 3).wanted(3, MISSED) == 3


def test_load_that_swings_within_the_bands_moves_nothing() -> None:
    swing = [Seen(0.12, 0.75, 0), Seen(0.0, 0.55, 0)] * 20
    assert after(Scaler(1, 100), 10, *swing) == [10] * 40
