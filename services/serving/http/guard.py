"""A service without tokens answers its own machine only: web pages of other sites are refused.

A page in a user's browser can send requests to 127.0.0.1. Its browser names the page's site in Origin or
Sec-Fetch-Site, or, if the site's name has been pointed at this machine, in Host.
"""

from urllib.parse import urlsplit

from fastapi import Request

from sdft.services.config.service import LOOPBACK
from sdft.services.serving.http.errors import ApiError


def refuse_other_sites(request: Request) -> None:
    """Raise ApiError 403 for a request that a page of another site has sent."""
    host = urlsplit(f"//{request.headers.get('Host', '')}").hostname
    if host not in LOOPBACK:
        raise ApiError(403, "wrong_host", f"this service has no tokens and answers on loopback only, not as {host}")
    origin = request.headers.get("Origin")
    own = f"{request.url.scheme}://{request.headers.get('Host', '')}"
    if (origin is not None and origin != own) or request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        raise ApiError(403, "other_site", "a page of another site sent this request; this service has no tokens")
