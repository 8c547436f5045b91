"""Whether there is a token for Ray: as Ray itself finds it, and `sdft submit` sends it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdft.services.cluster.token import has_token

# The variables, the content of the file in the home folder, and whether there is a token. FILE: a file with one.
CASES: list[tuple[dict[str, str], str | None, bool]] = [
    ({}, None, False),
    ({}, "1", True),
    ({}, "\n", False),
    ({"RAY_AUTH_TOKEN": "1"}, None, True),
    ({"RAY_AUTH_TOKEN": ""}, None, False),
    ({"RAY_AUTH_TOKEN_PATH": "FILE"}, None, True),
    ({"RAY_AUTH_TOKEN_PATH": ""}, None, False),
]


@pytest.mark.parametrize(("variables", "kept", "expected"), CASES)
def test_a_token_is_found_where_ray_finds_it_and_is_sent_with_a_job(
    variables: dict[str, str], kept: str | None, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("1")
    if kept is not None:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(kept)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("FILE", str(tmp_path / "token")))
    assert has_token() == expected
    code = (
        "import os; from sdft.services.cluster.submit import _client; _client()\n"
        "from ray._raylet import AuthenticationTokenLoader\n"
        "print(AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True), os.environ.get('RAY_AUTH_MODE'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.split() == [str(expected), "token" if expected else "None"]
