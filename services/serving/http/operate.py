"""Releases, status and metrics: what is served, what is learnt, and what a person decides about it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Request

from sdft.services.serving.decisions import NotPossible
from sdft.services.serving.engine import NotChanged
from sdft.services.serving.http.errors import ApiError
from sdft.services.serving.window import record_name

if TYPE_CHECKING:
    from sdft.services.serving.service import Service


def operating(service: "Service", check: Callable[[Request], object]) -> APIRouter:
    """Return the routes. check: of a request's token."""
    routes = APIRouter(dependencies=[Depends(check)], tags=["operate"])

    @routes.get("/v1/releases")
    async def list_releases() -> dict[str, Any]:
        """All releases, the newest first, with what the gate found."""
        state = service.journal.state
        return {"served": state.served, "releases": [service.release_row(n) for n in sorted(state.releases)[::-1]]}

    @routes.get("/v1/releases/{release}")
    async def get_release(release: int) -> dict[str, Any]:
        """One release, with what the gate found for each set."""
        if release not in service.journal.state.releases:
            raise ApiError(404, "unknown_release", f"there is no release {release}")
        return service.release_row(release)

    @routes.post("/v1/releases/{release}/promote")
    async def promote(release: int) -> dict[str, Any]:
        """Serve this release. Answers in flight end with the release that they began with."""
        with _explained():
            await service.decisions.promote(release, "operator")
        return service.release_row(release)

    @routes.post("/v1/releases/{release}/rollback")
    async def roll_back(release: int) -> dict[str, Any]:
        """Of the served release: serve the one before it. Of a held one: refuse it. Of an earlier one: go back to it.

        The records of the windows that are taken back are quarantined.
        """
        with _explained():
            served = await service.decisions.roll_back(release, "operator")
        return service.release_row(served)

    @routes.post("/v1/releases/{release}/hold")
    async def hold(release: int) -> dict[str, Any]:
        """Have a candidate wait for a person."""
        with _explained():
            await service.decisions.hold(release, "operator")
        return service.release_row(release)

    @routes.post("/v1/releases/{release}/pin")
    async def pin(release: int, pinned: bool = True) -> dict[str, Any]:
        """Keep the weights of a release, however many come after it; with ?pinned=false not any more."""
        with _explained():
            service.decisions.pin(release, pinned)
        return service.release_row(release)

    @routes.post("/v1/windows/{window}/retry")
    async def retry(window: int) -> dict[str, Any]:
        """Let the quarantined records of a window wait again."""
        with _explained():
            return {"ids": [record_name(i) for i in service.decisions.let_out(window)]}

    @routes.get("/v1/status")
    async def status() -> dict[str, Any]:
        """What is served, what the service does now, the records by state, and the window that is trained."""
        return await service.status()

    return routes


@contextmanager
def _explained() -> Iterator[None]:
    """Raise ApiError 404 or 409 if what a person asked for is not possible, 503 if it failed."""
    try:
        yield
    except NotPossible as error:
        status, code = (404, "unknown_release") if "there is no release" in str(error) else (409, "not_possible")
        raise ApiError(status, code, str(error)) from None
    except NotChanged as error:
        raise ApiError(503, "not_changed", f"the release of before is served: {error}") from None
