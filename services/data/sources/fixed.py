"""The records of a file or of a hub data set, all known before the run."""

from collections.abc import Sequence
from typing import ClassVar

from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.data.sources.base import PromptSource


class FixedSource(PromptSource):
    """Records that are loaded and checked before anything starts."""

    grows: ClassVar[bool] = False

    def __init__(self, name: str, records: Sequence[Record], prompts: Sequence[PromptPair]) -> None:
        self.name, self.records, self.prompts = name, records, prompts

    @property
    def closed(self) -> bool:
        return True

    def read(self, count: int) -> None:
        pass
