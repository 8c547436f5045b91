"""A failed engine or learner ends a command with one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdft.services.base.errors import PreflightError, RetentionLost, UserError


@contextmanager
def explaining(run_dir: Path | None) -> Iterator[None]:
    """Convert a failed engine or learner into RunFailed, with the root cause from its log. The log has the rest."""
    try:
        yield
    except (UserError, PreflightError, RetentionLost):
        raise
    except Exception as error:
        from sdft.services.cli.root_cause import explained

        if (failure := explained(error, run_dir)) is None:
            raise
        raise failure from error
