"""Every sample of a run, from issue to training: issued -> sampled -> scored -> trained, or dropped with a reason.

    Accounts: the state machine, in memory: samples in flight, and counts by state
    Ledger:   the same in SQLite, written several moves at a time and part of each checkpoint

Of a source that grows while the run goes on, the ledger also has the records that were drawn, with their digests: the
prefix that a resumed run compares with the source (planning/prefix.py).

A resumed run continues from the ledger that belongs to its weights, so no sample is lost or trained twice. `advance`
writes moves to the file once WRITE_EVERY_S have passed since the last write; `audit` writes them before a step's
metrics are written. Written moves survive the death of the process, but not of the machine: after that a checkpoint's
copy replaces the file anyway.
"""

import os
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from sdft.actors.shared.types import SampleId

NEXT = {"issued": "sampled", "sampled": "scored", "scored": "trained"}
BEFORE = {after: before for before, after in NEXT.items()}
IN_FLIGHT = ("issued", "sampled", "scored")
WRITE_EVERY_S = 0.5
Account = tuple[int, int, str]  # stage, epoch, state
OF_RECORD = "samples.stage = records.stage AND samples.idx = records.idx"


@dataclass(frozen=True)
class Drawn:
    """A record of a growing source that samples were issued for."""

    stage: int
    index: int  # in the source
    where: str  # "name:number" of its row, for messages
    digest: str  # of its prompts


class LedgerError(Exception):
    """The accounts do not add up: a sample was lost, trained twice or moved out of order."""


class Accounts:
    """The state machine of samples, with counts by state. A call that raises changes nothing."""

    def __init__(self, counts: Counter[Account], open_: dict[SampleId, str]) -> None:
        """counts: samples by stage, epoch and state; open_: the state of each sample in flight."""
        self._counts = counts
        self._open = open_

    def issue(self, samples: Sequence[SampleId]) -> None:
        """Enter new samples. The caller checks that they are new, against the file, which holds all samples."""
        self._open |= dict.fromkeys(samples, "issued")
        for (stage, epoch), n in _by_epoch(samples).items():
            self._counts[stage, epoch, "issued"] += n

    def advance(self, samples: Sequence[SampleId], state: str) -> None:
        before = BEFORE[state]
        wrong = [s for s in samples if self._open.get(s) != before]
        if wrong:
            raise LedgerError(
                f"{len(wrong)} of {len(samples)} samples cannot become {state}, because they are not {before}"
            )
        for (stage, epoch), n in _by_epoch(samples).items():
            self._counts[stage, epoch, before] -= n
            self._counts[stage, epoch, state] += n
        if state in IN_FLIGHT:
            self._open |= dict.fromkeys(samples, state)
        else:
            for s in samples:
                del self._open[s]

    def state(self, sample: SampleId) -> str | None:
        """Return the state of a sample that is in flight; None if it is not."""
        return self._open.get(sample)

    def those(self, samples: Sequence[SampleId], state: str) -> list[SampleId]:
        """Return the samples that are in a state, in order."""
        return [s for s in samples if self._open.get(s) == state]

    def drop(self, sample: SampleId) -> None:
        if sample not in self._open:
            raise LedgerError(f"sample {sample} cannot be dropped: it is not in flight")
        self._counts[sample.stage, sample.epoch, self._open.pop(sample)] -= 1
        self._counts[sample.stage, sample.epoch, "dropped"] += 1

    def forget_in_flight(self) -> int:
        forgotten = len(self._open)
        self._counts -= Counter((s.stage, s.epoch, state) for s, state in self._open.items())
        self._open.clear()
        return forgotten

    @property
    def counts(self) -> dict[Account, int]:
        """Samples by stage, epoch and state, without zero counts."""
        return {account: count for account, count in self._counts.items() if count}


def _by_epoch(samples: Sequence[SampleId]) -> dict[tuple[int, int], int]:
    """Count samples by stage and epoch. A Counter would take longer for the one sample of a streamed group."""
    counts: dict[tuple[int, int], int] = {}
    for s in samples:
        counts[s[:2]] = counts.get(s[:2], 0) + 1
    return counts


class Ledger:
    """The ledger of one run directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS samples (stage INTEGER, epoch INTEGER, idx INTEGER, generation INTEGER,"
            " state TEXT NOT NULL, step INTEGER NOT NULL, tokens INTEGER, reason TEXT,"
            " PRIMARY KEY (stage, epoch, idx, generation))"
        )
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS records (stage INTEGER, idx INTEGER, place TEXT NOT NULL, digest TEXT NOT NULL,"
            " PRIMARY KEY (stage, idx))"
        )
        self._db.commit()
        rows = self._db.execute(f"SELECT stage, epoch, idx, generation, state FROM samples WHERE state IN {IN_FLIGHT}")
        self._accounts = Accounts(self._filed(), {SampleId(*key): state for *key, state in rows})
        self._moves: dict[SampleId, tuple[str, int | None, str | None]] = {}  # not written yet: (state, tokens, reason)
        self._written = time.monotonic()

    def issue(self, samples: Sequence[SampleId], step: int, drawn: Sequence[Drawn] = ()) -> None:
        """Enter the samples of optimizer step `step`. Raises LedgerError if one was issued before.

        drawn: the records of a growing source that the samples belong to.
        """
        try:
            self._write([(*s, "issued", step) for s in samples], map(astuple, drawn))
        except sqlite3.IntegrityError as error:
            raise LedgerError(f"step {step}: a sample would be issued a second time ({error})") from error
        self._accounts.issue(samples)

    def advance(self, samples: Sequence[SampleId], state: str, tokens: Sequence[int] | None = None) -> None:
        """Move samples to `state`, the next one after their current state. tokens: completion lengths, when known.

        Raises LedgerError if a sample is in any other state.
        """
        self._accounts.advance(samples, state)
        lengths: Sequence[int | None] = tokens if tokens is not None else self._lengths(samples)
        self._moves |= zip(samples, [(state, length, None) for length in lengths], strict=True)
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self._write()

    def _lengths(self, samples: Sequence[SampleId]) -> list[int | None]:
        """Return the completion lengths of samples, as far as they are known and not written yet."""
        return [None if (known := self._moves.get(s)) is None else known[1] for s in samples]

    def state(self, sample: SampleId) -> str | None:
        """Return the state of a sample that is in flight; None if it is not."""
        return self._accounts.state(sample)

    def those(self, samples: Sequence[SampleId], state: str) -> list[SampleId]:
        """Return the samples that are in a state, in order."""
        return self._accounts.those(samples, state)

    def drop(self, sample: SampleId, reason: str) -> None:
        """Mark a sample as dropped, with the reason. Raises LedgerError if it is not in flight."""
        self._accounts.drop(sample)
        known = self._moves.get(sample)
        self._moves[sample] = "dropped", known[1] if known is not None else None, reason

    def forget_in_flight(self) -> int:
        """Delete the samples in flight and return how many. A restart loses their work; they are issued again."""
        self._write()
        with self._db:
            self._db.execute(f"DELETE FROM samples WHERE state IN {IN_FLIGHT}")
            self._db.execute(f"DELETE FROM records WHERE NOT EXISTS (SELECT 1 FROM samples WHERE {OF_RECORD})")
        return self._accounts.forget_in_flight()

    def counts(self) -> dict[str, int]:
        """Return the number of samples in each state."""
        counts: Counter[str] = Counter()
        for (_, _, state), count in self._accounts.counts.items():
            counts[state] += count
        return dict(counts)

    def audit(self, issued: dict[tuple[int, int], int]) -> tuple[int, int, int]:
        """Return (trained, dropped, in flight), and write all moves to the file.

        issued: samples issued so far, by (stage, epoch). Raises LedgerError unless the three add up to it in each stage
        and epoch.
        """
        self._write()
        found: dict[tuple[int, int], Counter[str]] = {key: Counter() for key in issued}
        for (stage, epoch, state), count in self._accounts.counts.items():
            found.setdefault((stage, epoch), Counter())["in flight" if state in IN_FLIGHT else state] += count
        for (stage, epoch), counts in found.items():
            if counts.total() != issued.get((stage, epoch), 0):
                raise LedgerError(
                    f"stage {stage}, epoch {epoch}: {issued.get((stage, epoch), 0)} samples were issued, but the "
                    f"ledger has {counts['trained']} trained, {counts['dropped']} dropped and {counts['in flight']} in "
                    f"flight"
                )
        total = sum(found.values(), Counter())
        return total["trained"], total["dropped"], total["in flight"]

    def copy_to(self, path: Path) -> None:
        """Write a consistent copy for a checkpoint. Raises LedgerError if the file differs from the accounts."""
        self._write()
        filed = dict(self._filed())
        if filed != self._accounts.counts:
            raise LedgerError(f"{self._path} has {filed}, but the accounts in memory are {self._accounts.counts}")
        target = sqlite3.connect(path)
        try:
            self._db.backup(target)
        finally:
            target.close()

    def close(self) -> None:
        self._write()
        self._db.close()

    def _filed(self) -> "Counter[Account]":
        """Return the counts in the file."""
        rows = self._db.execute("SELECT stage, epoch, state, COUNT(*) FROM samples GROUP BY stage, epoch, state")
        return Counter({(stage, epoch, state): count for stage, epoch, state, count in rows})

    def _write(self, issued: Iterable[tuple[object, ...]] = (), drawn: Iterable[tuple[object, ...]] = ()) -> None:
        """Write pending moves, newly issued samples and their records to the file in one transaction."""
        moves = [(*move, *s) for s, move in self._moves.items()]
        with self._db:
            self._db.executemany(
                "UPDATE samples SET state = ?, tokens = COALESCE(?, tokens), reason = ?"
                " WHERE stage = ? AND epoch = ? AND idx = ? AND generation = ?",
                moves,
            )
            self._db.executemany(
                "INSERT INTO samples (stage, epoch, idx, generation, state, step) VALUES (?, ?, ?, ?, ?, ?)", issued
            )
            self._db.executemany("INSERT INTO records VALUES (?, ?, ?, ?)", drawn)
        self._moves.clear()
        self._written = time.monotonic()


def restore_ledger(copy: Path | None, path: Path) -> None:
    """Replace the run's ledger by a checkpoint's copy. None: remove the ledger, so that an empty one begins."""
    for side in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + side).unlink(missing_ok=True)
    if copy is None:
        path.unlink(missing_ok=True)
        return
    part = path.with_name(f".{path.name}.part")
    shutil.copyfile(copy, part)  # without permissions, because the run writes to it
    os.replace(part, path)


def read_drawn(path: Path, stage: int) -> list[Drawn]:
    """Return the records of a stage that a ledger's trained and dropped samples belong to, in order.

    Empty for a ledger that a version without growing sources has written.
    """
    ended = f"EXISTS (SELECT 1 FROM samples WHERE {OF_RECORD} AND state NOT IN {IN_FLIGHT})"
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as ledger:
        if not ledger.execute("SELECT 1 FROM sqlite_master WHERE name = 'records'").fetchone():
            return []
        rows = ledger.execute(f"SELECT * FROM records WHERE stage = ? AND {ended} ORDER BY idx", (stage,))
        return [Drawn(*row) for row in rows]
