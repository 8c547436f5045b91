"""The environment of a command: proxies, the user, the folder of temporary files."""

import ipaddress
import os
import pwd
import tempfile
from urllib.parse import urlsplit

from sdft.services.base.errors import UserError

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
NOT_BY_PROXY = ("127.0.0.1", "localhost", "::1")
USER_NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # Python reads the user name here before the user id
SOCKET_PATH = 107  # bytes in the path of a Unix socket on Linux, at most
RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # below Ray's folder


def check_environment() -> None:
    """Correct the environment before any library reads it.

    Adds loopback addresses to no_proxy if there are proxies, and sets USER if the user id has no name. Raises UserError
    if such a user has no HOME either.
    """
    if named_proxies():
        hosts = (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")
        hosts = list(dict.fromkeys([*(host.strip() for host in hosts if host.strip()), *NOT_BY_PROXY]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:  # as in a container that runs with an arbitrary user id
        if not any(os.environ.get(name) for name in USER_NAMES):
            os.environ["USER"] = f"uid-{os.getuid()}"
        if not os.environ.get("HOME"):
            raise UserError(
                f"HOME is not set, and user id {os.getuid()} has no entry in the user database; set HOME to a folder "
                f"that can be written to"
            ) from None


def check_temporary(prefix: str) -> None:
    """Raise UserError unless paths of Ray's sockets fit below the temporary folder, in a folder with this prefix."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError:
        raise UserError("no folder for temporary files is writable; set TMPDIR to a writable folder") from None
    longest = SOCKET_PATH - len(os.fsencode(f"/{prefix}12345678{RAY_SOCKET}"))
    if len(os.fsencode(folder)) > longest:
        raise UserError(
            f"TMPDIR: the path {folder} has {len(os.fsencode(folder))} bytes, so paths of Ray's sockets below it would "
            f"exceed {SOCKET_PATH}; set TMPDIR to a folder whose path has at most {longest} bytes, such as /tmp"
        )


def named_proxies() -> str:
    """Return the proxies in the environment, as NAME=ADDRESS without a password; empty if there are none."""
    found = []
    for name in PROXIES:
        address = os.environ.get(name) or os.environ.get(name.lower())
        if address:
            found.append(f"{name}={address.rpartition('@')[2]}")
    return ", ".join(found)


def is_loopback(url: str) -> bool:
    """Return whether an address such as http://localhost:8000/v1 is a loopback address."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
