"""Every sample of a run, from issue to training: issued -> sampled -> scored -> trained, or dropped with a reason.

Kept in SQLite, committed after every move, audited every step, and part of each checkpoint: a resumed run continues
from the ledger that belongs to its weights, so nothing is lost or trained twice.
"""

import os
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

from actors.types import SampleId

NEXT = {"issued": "sampled", "sampled": "scored", "scored": "trained"}
IN_FLIGHT = ("issued", "sampled", "scored")


class LedgerError(Exception):
    """The accounts do not add up: a sample was lost, trained twice or moved out of turn."""


class Ledger:
    """The ledger of one run directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path)
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS samples (stage INTEGER, epoch INTEGER, idx INTEGER, generation INTEGER,"
            " state TEXT NOT NULL, step INTEGER NOT NULL, tokens INTEGER, reason TEXT,"
            " PRIMARY KEY (stage, epoch, idx, generation))"
        )
        self._db.commit()

    def issue(self, samples: Iterable[SampleId], step: int) -> None:
        """Enter samples that optimizer step `step` is to train on. LedgerError if one was issued before."""
        rows = [(*_key(s), "issued", step) for s in samples]
        try:
            with self._db:
                self._db.executemany(
                    "INSERT INTO samples (stage, epoch, idx, generation, state, step) VALUES (?, ?, ?, ?, ?, ?)", rows
                )
        except sqlite3.IntegrityError as error:
            raise LedgerError(f"step {step}: a sample would be issued a second time ({error})") from error

    def advance(self, samples: Sequence[SampleId], state: str, tokens: Sequence[int] | None = None) -> None:
        """Move samples to `state`, the one after their present one; `tokens`: completion lengths, when known."""
        previous = {after: before for before, after in NEXT.items()}[state]
        lengths = tokens if tokens is not None else [None] * len(samples)
        rows = [(state, length, *_key(s), previous) for s, length in zip(samples, lengths, strict=True)]
        with self._db:
            changed = self._db.executemany(
                "UPDATE samples SET state = ?, tokens = COALESCE(?, tokens)"
                " WHERE stage = ? AND epoch = ? AND idx = ? AND generation = ? AND state = ?",
                rows,
            ).rowcount
            if changed != len(rows):
                raise LedgerError(
                    f"{len(rows) - changed} of {len(rows)} samples could not become {state}: {previous} before?"
                )

    def forget_in_flight(self) -> int:
        """After a restart: what was being made is lost with its makers, and will be issued anew. Returns how many."""
        with self._db:
            return self._db.execute(f"DELETE FROM samples WHERE state IN {IN_FLIGHT}").rowcount

    def drop(self, sample: SampleId, reason: str) -> None:
        """A sample that will not be trained, and why."""
        with self._db:
            changed = self._db.execute(
                "UPDATE samples SET state = 'dropped', reason = ? WHERE stage = ? AND epoch = ? AND idx = ?"
                f" AND generation = ? AND state IN {IN_FLIGHT}",
                (reason, *_key(sample)),
            ).rowcount
            if changed != 1:
                raise LedgerError(f"sample {sample} cannot be dropped: it is not in flight")

    def counts(self) -> dict[str, int]:
        """Samples in each state."""
        return dict(self._db.execute("SELECT state, COUNT(*) FROM samples GROUP BY state"))

    def audit(self, expected: int) -> tuple[int, int, int]:
        """(trained, dropped, in flight), which must add up to the `expected` samples issued so far."""
        counts = self.counts()
        in_flight = sum(counts.get(state, 0) for state in IN_FLIGHT)
        trained, dropped = counts.get("trained", 0), counts.get("dropped", 0)
        if trained + dropped + in_flight != expected:
            raise LedgerError(
                f"{expected} samples were issued, but the ledger has {trained} trained, {dropped} dropped and "
                f"{in_flight} in flight"
            )
        return trained, dropped, in_flight

    def copy_to(self, path: Path) -> None:
        """A consistent copy, for a checkpoint."""
        target = sqlite3.connect(path)
        try:
            self._db.backup(target)
        finally:
            target.close()

    def close(self) -> None:
        self._db.close()


def restore_ledger(copy: Path | None, path: Path) -> None:
    """Put a checkpoint's copy in the place of the run's ledger; None: begin an empty one."""
    for side in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    if copy is None:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f".{path.name}.part")
    shutil.copy(copy, part)
    os.replace(part, path)


def _key(sample: SampleId) -> tuple[int, int, int, int]:
    return sample.stage, sample.epoch, sample.index, sample.generation
