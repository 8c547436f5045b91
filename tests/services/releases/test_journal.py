"""The journal: decisions survive, one writer, and a line that is no decision is refused."""

import os
from pathlib import Path

import pytest

from sdft.services.releases.events import Candidate, Held, Served
from sdft.services.releases.journal import Journal, JournalDamaged, ServiceRunning, read_state

FIRST = Candidate(1, None, "/model", {"a": "1"}, 0, {}, 0.0)


def test_decisions_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(FIRST)
    journal.write(Served(1, "start", 1.0))
    assert read_state(journal.path).served == 1
    with pytest.raises(ServiceRunning, match="another service runs"):
        Journal(journal.path)
    journal.close()
    again = Journal(journal.path)
    assert again.state.releases[1].files == {"a": "1"}
    again.close()


def test_a_torn_line_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(FIRST)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "served", "rel')
    again = Journal(journal.path)
    assert again.state.served is None
    again.write(Served(1, "start", 1.0))
    again.close()
    assert read_state(journal.path).served == 1


@pytest.mark.parametrize("line", ["not json", "{}", '{"kind": "unknown"}', '{"kind": "served"}', "[]"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(JournalDamaged, match=r"journal\.jsonl:1 is no decision"):
        Journal(path)


def test_a_full_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write(FIRST)
    before = journal.path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.write(Held(1, "gate", "x", 1.0))
    assert journal.path.read_bytes() == before
    assert journal.state.releases[1].status == "candidate"
    journal.write(Served(1, "start", 1.0))
    assert read_state(journal.path).served == 1
    journal.close()
