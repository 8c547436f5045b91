"""Sources of records for tests that read no file."""

from sdft.services.data.pairs import PromptPair
from sdft.services.data.sources.fixed import FixedSource


def numbered(count: int) -> FixedSource:
    """Return a fixed source of so many records; prompt i is the token i."""
    return FixedSource("numbered", [], [PromptPair.of([i], [i]) for i in range(count)])
