"""What the environment may set: proxies, a user id without a name, a folder for temporary files with a long path."""

import os
import pwd
import tempfile
from pathlib import Path

import huggingface_hub.constants
import pytest

from sdft.services.base.environment import check_environment, check_temporary, is_loopback, named_proxies
from sdft.services.base.errors import UserError
from sdft.services.cli.main import main
from tests.runs.run import write_run


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        for written in (name, name.lower()):
            monkeypatch.setenv(written, "")  # monkeypatch restores the variables at the end


def test_no_proxy_is_used_for_this_machine_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet, localhost")
    check_environment()
    assert os.environ["NO_PROXY"] == "intranet, localhost", "without a proxy nothing is touched"
    monkeypatch.setenv("all_proxy", "socks5://user:secret@proxy:1080")
    check_environment()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "intranet,localhost,127.0.0.1,::1"
    assert named_proxies() == "ALL_PROXY=proxy:1080"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.1.2.3/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://10.0.0.1:8000/v1", False),
        ("https://localhost.example.com/v1", False),
    ],
)
def test_addresses_of_this_machine_only(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected


def test_a_user_without_a_name_gets_one_and_needs_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    check_environment()
    assert os.environ["USER"] == f"uid-{os.getuid()}"
    monkeypatch.delenv("HOME")
    with pytest.raises(UserError, match=r"HOME is not set, and user id \d+ has no entry .*; set HOME to a folder"):
        check_environment()


def test_a_folder_whose_sockets_would_have_too_long_paths_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    check_temporary("sdft-ray-")
    monkeypatch.setattr(tempfile, "tempdir", "/scratch/users/someone/job-12345/temporary")
    with pytest.raises(
        UserError, match=r"TMPDIR: the path /scratch/.* has 42 bytes, .* at most 25 bytes, such as /tmp"
    ):
        check_temporary("sdft-ray-")


def test_a_socks_proxy_without_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """httpx would use the proxy to reach the hub."""
    huggingface_hub.close_session()  # an earlier test's client has no proxy
    monkeypatch.setenv("all_proxy", "socks5://user:secret@proxy:1080")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    config = write_run(tmp_path, Path("someone/a-model"), "float32")
    assert main(["check", str(config)]) == 2
    assert capsys.readouterr().err == (
        "sdft: the environment names a SOCKS proxy (ALL_PROXY=proxy:1080), which needs the package socksio; run "
        "`pip install socksio`, or unset the variable\n"
    )
