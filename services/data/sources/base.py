"""The protocol of a source: the records of a stage and their prompts, in order.

    file, hub data set     fixed      all records are known before the run; the schedule shuffles them in each epoch
    log, a user's own      growing    records are added while the run goes on; the schedule takes each once, in order

A record keeps its index. The identity of a prefix, the first n records, is the digest of each of them: new records
behind it do not change it.
"""

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from sdft.actors.shared.waiting import within
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair

POLL_S = 0.5  # between two looks for new records


class PromptSource(ABC):
    """The records of one stage."""

    grows: ClassVar[bool]  # records may be added while the run goes on
    name: str  # for messages: the path or the name of the data set
    records: Sequence[Record]  # the known ones; a growing source appends to it
    prompts: Sequence[PromptPair]  # of the same records
    skipped: Sequence[str] = ()  # the bad rows, as "name:number: what is wrong"

    @property
    def known(self) -> int:
        """Number of records that are known."""
        return len(self.prompts)

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether no record follows the known ones."""

    @abstractmethod
    def read(self, count: int) -> None:
        """Look for new records until `count` are known. Does not wait for any."""

    @property
    def trouble(self) -> str:
        """What is wrong with the source, to be added to the error of a wait; empty if nothing is."""
        return ""

    def digest(self, index: int) -> str:
        """Return the identity of a record: a digest of the token ids of its prompts, 32 hex digits."""
        return hashlib.sha256(self.prompts[index].encoded).hexdigest()[:32]

    async def wait(self, count: int, timeout_s: float) -> None:
        """Wait until `count` records are known or the source is closed. TimeoutError after `timeout_s`."""
        what = f"record {count} of {self.name} ({self.known} known)"
        before = self.known
        try:
            await within(self._arrived(count), timeout_s, what)
        except TimeoutError as error:
            arrived = f"; {self.known - before} arrived meanwhile" if self.known > before else ""
            trouble = f"; {self.trouble}" if self.trouble else ""
            raise TimeoutError(
                f"{error}{arrived}{trouble}; add records, or raise data.record_timeout_s, and run the same command "
                f"again: it resumes from the last checkpoint"
            ) from error

    async def _arrived(self, count: int) -> None:
        while True:
            self.read(count)
            if self.known >= count or self.closed:
                return
            await asyncio.sleep(POLL_S)
