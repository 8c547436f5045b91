"""Waiting for several things at once."""

import asyncio
import gc
import warnings

import pytest

from sdft.actors.shared.waiting import all_of


def test_work_that_is_cancelled_before_it_begins_leaves_no_warning() -> None:
    """As a run that is stopped at the moment when it starts its engines."""

    async def work() -> None:
        raise AssertionError("begun")

    async def main() -> None:
        waiting = asyncio.create_task(all_of([work()]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    gc.collect()  # what other tests have left
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        asyncio.run(main())
        gc.collect()
    assert [str(one.message) for one in found] == []
