"""A transport through files, one of which is damaged on its way."""

import numpy as np
from numpy.typing import NDArray

from sdft.actors.shared.types import Snapshot
from tests.fakes.file_transport import FileSender, FileTransport, folder

DAMAGED = 1  # version of the student's weights whose first file is damaged


class DamagingSender(FileSender):
    """Flips a byte of one file."""

    _done = False

    def offer(self, snapshot: Snapshot, payload: NDArray[np.uint8]) -> Snapshot:
        """Write the file as the others are written; the first one of DAMAGED is spoiled afterwards."""
        offered = super().offer(snapshot, payload)
        if snapshot.role == "student" and snapshot.version == DAMAGED and not self._done:
            self._done = True
            with (folder() / offered.path).open("r+b") as file:
                file.seek(1000)
                file.write(bytes([payload[1000] ^ 1]))
        return offered


class DamagingTransport(FileTransport):
    """A FileTransport with a DamagingSender."""

    @staticmethod
    def sender(device: str, address: str) -> DamagingSender:
        """Return the learner's end."""
        return DamagingSender()
