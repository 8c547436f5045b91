"""Tokens of a service: a file with the hash of each, its name and its scopes.

    ask       the model: /v1/chat/completions and the like
    teach     demonstrations, feedback and records
    operate   releases, status and metrics

A token is 32 random bytes, so its plain SHA-256 cannot be reversed.
"""

import hashlib
import hmac
import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft.services.base.errors import UserError
from sdft.services.base.files import read_text, write_atomically

SCOPES = ("ask", "teach", "operate")
PREFIX = "sdft-"


@dataclass(frozen=True)
class Holder:
    """Whose token it is."""

    name: str
    scopes: frozenset[str]


ANYONE = Holder("anyone", frozenset(SCOPES))  # where no tokens are needed


class Tokens:
    """The tokens in a file. It is read again when it changes."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file cannot be read, or has no token."""
        self._path = path
        self._read_at: int | None = None
        self._entries: list[tuple[str, Holder]] = []
        self._refresh()
        if not self._entries:
            raise UserError(f"{path}: there is no token in it; make one with `sdft tokens {path} --name app`")

    def holder(self, token: str) -> Holder | None:
        """Return whose token this is; None if it is none."""
        self._refresh()
        given = hashlib.sha256(token.encode()).hexdigest()
        return next((holder for known, holder in self._entries if hmac.compare_digest(known, given)), None)

    def _refresh(self) -> None:
        try:
            changed = self._path.stat().st_mtime_ns
        except OSError as error:
            if self._read_at is None:
                raise UserError(f"service.http.tokens: {self._path} cannot be read ({error.strerror})") from None
            self._entries = []  # it was removed
            return
        if changed == self._read_at:
            return
        try:
            self._entries = [(e["sha256"], Holder(e["name"], frozenset(e["scopes"]))) for e in read_tokens(self._path)]
        except UserError:
            if self._read_at is None:
                raise
            return  # it is being written by an editor: the known ones hold until it is whole
        self._read_at = changed


def read_tokens(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a file of tokens, [] if there is none. Raises UserError if it is something else."""
    if not path.exists():
        return []
    try:
        entries = json.loads(read_text(path))["tokens"]
        if not all({"sha256", "name", "scopes"} <= e.keys() for e in entries):
            raise KeyError("sha256, name or scopes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a file of tokens ({error}); make one with `sdft tokens`") from None
    return list(entries)


def add_token(path: Path, name: str, scopes: list[str]) -> str:
    """Add a token to the file, which is made if there is none. Returns the token, which is nowhere else."""
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        raise UserError(
            f"--scopes: {unknown[0] if unknown else 'nothing'} is no scope; give some of {','.join(SCOPES)}"
        )
    entries = read_tokens(path)
    if any(e["name"] == name for e in entries):
        raise UserError(f"{path}: there is a token of {name} already; remove it first, or choose another --name")
    token = PREFIX + secrets.token_urlsafe(32)
    sha256 = hashlib.sha256(token.encode()).hexdigest()
    entries.append({"name": name, "scopes": scopes, "sha256": sha256, "made": time.time()})
    _write(path, entries)
    return token


def remove_token(path: Path, name: str) -> None:
    """Remove a token from the file. Raises UserError if there is none of this name."""
    entries = read_tokens(path)
    kept = [e for e in entries if e["name"] != name]
    if len(kept) == len(entries):
        raise UserError(f"{path}: there is no token of {name}")
    _write(path, kept)


def _write(path: Path, entries: list[dict[str, Any]]) -> None:
    try:
        write_atomically(path, (json.dumps({"tokens": entries}, indent=2) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: the file cannot be written ({error.strerror}); name another one") from None
