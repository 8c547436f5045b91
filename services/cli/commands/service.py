"""`sdft releases`, `records`, `rollback`, `promote` and `tokens`: what looks at a service, and what operates it."""

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from sdft.services.base.errors import PreflightError, UserError

TOKEN = "SDFT_TOKEN"  # environment variable: the token of a person who operates a service
TIMEOUT_S = 600  # a release is served once the answers in flight have ended

ServiceDir = Annotated[Path, typer.Argument(metavar="SERVICE", help="The folder of the service.", show_default=False)]
ReleaseNumber = Annotated[int, typer.Argument(metavar="RELEASE", help="Number of the release.", show_default=False)]


def releases(service: ServiceDir) -> None:
    """Show the releases of a service."""
    state = _state(service)
    for number in sorted(state.releases, reverse=True):
        release = state.releases[number]
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(release.made))
        reason = f"  {release.reason}" if release.reason else ""
        print(
            f"{number:>4}  {release.status:<10}{made}  {release.origin}{'  pinned' if release.pinned else ''}{reason}"
        )


def records(
    service: ServiceDir,
    audit: Annotated[
        bool, typer.Option("--audit", help="Compare with the ledgers of the windows; exit with 1 if they disagree.")
    ] = False,
) -> int:
    """Show how many records of a service are in each state."""
    from sdft.services.serving.audit import audit_of

    found = audit_of(_checked(service))
    for name, count in found.counts.items():
        print(f"{name:<12}{count:>8}")
    print(f"{'received':<12}{found.received:>8}")
    if not audit:
        return 0
    print(*found.faults or ["every record is in one state, and was trained as its window's ledger says"], sep="\n")
    return 1 if found.faults else 0


def rollback(
    service: ServiceDir,
    release: Annotated[
        int | None,
        typer.Option(
            "--release",
            help="Go back to this one, or refuse this held one (default: the served one).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve the release before the served one, refuse a held candidate, or go back to an earlier release."""
    served = _state(service).served if release is None else release
    print(f"release {_post(service, f'releases/{served}/rollback')['id']} is served")


def promote(service: ServiceDir, release: ReleaseNumber) -> None:
    """Serve a release."""
    print(f"release {_post(service, f'releases/{release}/promote')['id']} is served")


def tokens(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of tokens.", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="Make a token with this name, and print it.", show_default=False)
    ] = None,
    scopes: Annotated[str, typer.Option(help="What it may do: some of ask, teach and operate.")] = "ask,teach",
    remove: Annotated[str | None, typer.Option(help="Remove the token with this name.", show_default=False)] = None,
) -> None:
    """Make, remove or list the tokens of a service. The file keeps hashes only."""
    from sdft.services.serving.tokens import add_token, read_tokens, remove_token

    if name is not None and remove is not None:
        raise UserError("--name makes a token and --remove removes one; give one of them")
    if name is not None:
        print(add_token(file, name, [scope.strip() for scope in scopes.split(",") if scope.strip()]))
    elif remove is not None:
        remove_token(file, remove)
    else:
        for entry in read_tokens(file):
            print(f"{entry['name']}: {', '.join(entry['scopes'])}")


def _checked(service: Path) -> Path:
    from sdft.services.serving.folder import ServiceFolder

    if not ServiceFolder(service).journal.exists():
        raise UserError(f"{service}: no service in this folder; give the folder that `sdft serve` printed")
    return service


def _state(service: Path) -> Any:
    from sdft.services.releases.journal import read_state
    from sdft.services.serving.folder import ServiceFolder

    return read_state(ServiceFolder(_checked(service)).journal)


def _post(service: Path, path: str) -> Any:
    """Ask the running service. Raises UserError if it refuses, PreflightError if it does not run or answer."""
    from sdft.services.serving.folder import SERVICE

    place = _checked(service) / SERVICE
    if not place.exists():
        raise PreflightError(f"{service}: the service does not run; start it by `sdft serve {service}`")
    try:
        url = json.loads(place.read_text())["url"]
    except (ValueError, KeyError, OSError) as error:
        raise PreflightError(f"{place} cannot be read ({error}); start the service again") from None
    request = urllib.request.Request(f"{url}/v1/{path}", method="POST")
    if TOKEN in os.environ:
        request.add_header("Authorization", f"Bearer {os.environ[TOKEN]}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = json.load(error)["error"]["message"]
        hint = f"; set {TOKEN} to a token with the scope operate" if error.code in (401, 403) else ""
        raise UserError(f"{said}{hint}") from None
    except OSError as error:
        raise PreflightError(f"{url} does not answer ({error}); is the service running?") from None
