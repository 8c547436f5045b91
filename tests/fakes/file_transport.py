"""Weights through files: the learner writes each snapshot into a folder that all nodes share, and engines map it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from sdft.actors.shared.types import Snapshot
from sdft.actors.transport.protocol import Receiver, Sender, WeightTransport


def folder() -> Path:
    """Return the folder; a node may have it at a path of its own."""
    return Path(os.environ["WEIGHTS_FOLDER"])


class FileSender(Sender):
    """The learner's end."""

    def offer(self, snapshot: Snapshot, payload: NDArray[np.uint8]) -> Snapshot:
        """Write the version's file, and remove the one before: no engine loads that any more."""
        for old in folder().glob(f"{snapshot.role}-*"):
            old.unlink()
        file = folder() / f"{snapshot.role}-{snapshot.version}"
        payload.tofile(file)
        return replace(snapshot, path=file.name)


class FileReceiver(Receiver):
    """An engine's end."""

    def receive(self, snapshot: Snapshot) -> BinaryIO:
        """Open the version's file. The engine compares its digests with the learner's."""
        return (folder() / snapshot.path).open("rb")


class FileTransport(WeightTransport):
    """Named in the configuration: `weights.transport: my_package.my_module:FileTransport`."""

    @staticmethod
    def sender(device: str, address: str) -> FileSender:
        """Return the learner's end."""
        return FileSender()

    @staticmethod
    def receiver() -> FileReceiver:
        """Return an engine's end."""
        return FileReceiver()
