"""Records by state, kept up to date: what is asked at each request costs no pass over all records.

new records ──────────────► their states are added
decision, or a deletion ──► all states are found again
"""

from collections import Counter
from collections.abc import Sequence

from sdft.services.inbox.inbox import Inbox
from sdft.services.releases.journal import Journal
from sdft.services.releases.state import STATES


class RecordIndex:
    """The states of all records of a service."""

    def __init__(self, journal: Journal, inbox: Inbox) -> None:
        self._journal, self._inbox = journal, inbox
        self._seen = 0, 0  # decisions and deletions
        self._known = 0  # records whose states are counted
        self._counts: Counter[str] = Counter()
        self._waiting: list[int] = []

    def counts(self) -> dict[str, int]:
        """Return the number of records in each state; they add up to those that were received."""
        self._refresh()
        return {name: self._counts[name] for name in STATES}

    def waiting(self) -> Sequence[int]:
        """Return the records that wait for a window, the oldest first."""
        self._refresh()
        return self._waiting

    def _refresh(self) -> None:
        state, inbox = self._journal.state, self._inbox
        now = state.decisions, len(inbox.deleted)
        if now != self._seen:
            self._seen, self._known, self._counts, self._waiting = now, 0, Counter(), []
        for record in range(self._known, len(inbox.records)):
            found = state.record(record, record in inbox.deleted).state
            self._counts[found] += 1
            if found == "waiting":
                self._waiting.append(record)
        self._known = len(inbox.records)
