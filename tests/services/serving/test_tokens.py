"""Tokens: hashes in a file, scopes, and a file that changes while the service runs."""

import os
from pathlib import Path

import pytest

from sdft.services.base.errors import UserError
from sdft.services.serving.tokens import Tokens, add_token, remove_token


def test_a_token_opens_its_scopes_only(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "app", ["ask", "teach"])
    assert token not in path.read_text()
    tokens = Tokens(path)
    holder = tokens.holder(token)
    assert holder is not None
    assert (holder.name, holder.scopes) == ("app", {"ask", "teach"})
    assert tokens.holder(token[:-1]) is None
    assert tokens.holder("") is None


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    first = add_token(path, "app", ["ask"])
    tokens = Tokens(path)
    second = add_token(path, "ops", ["operate"])
    remove_token(path, "app")
    os.utime(path, (1, 1))  # another time than before, whatever the clock of the file system
    assert tokens.holder(first) is None
    assert tokens.holder(second) is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not a file of tokens"),
        ("{}", "not a file of tokens"),
        ('{"tokens": [{}]}', "not a file of tokens"),
        ('{"tokens": []}', "there is no token in it"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        Tokens(path)


def test_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    with pytest.raises(UserError, match="cannot be read"):
        Tokens(path)
    with pytest.raises(UserError, match="root is no scope; give some of ask,teach,operate"):
        add_token(path, "app", ["ask", "root"])
    add_token(path, "app", ["ask"])
    with pytest.raises(UserError, match="a token of app already"):
        add_token(path, "app", ["ask"])
    with pytest.raises(UserError, match="no token of ops"):
        remove_token(path, "ops")
