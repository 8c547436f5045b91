"""The application of a service: the model, what is taught, what is decided, and the page."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from sdft.services.serving.http.ask import Asking
from sdft.services.serving.http.errors import ApiError, add_error_handlers
from sdft.services.serving.http.metrics import registry_of
from sdft.services.serving.http.operate import operating
from sdft.services.serving.http.rate import Rate
from sdft.services.serving.http.requests import scope_check
from sdft.services.serving.http.teach import teaching
from sdft.services.serving.tokens import SCOPES

if TYPE_CHECKING:
    from sdft.services.serving.service import Service

PAGE = Path(__file__).with_name("page.html")
ASKED = {
    "/v1/chat/completions": "Answer a conversation, as OpenAI's API does: streams, tools, log-probs.",
    "/v1/completions": "Complete a text, as OpenAI's API does.",
    "/v1/messages": "Answer a conversation, as Anthropic's API does. It has no receipt.",
}


def make_app(service: "Service") -> FastAPI:
    """Return the application."""
    app = FastAPI(title="sdft", description="A model that learns while it serves.", docs_url=None, redoc_url=None)
    add_error_handlers(app)
    rate = Rate(service.http.max_per_minute)
    ask, teach, operate = (scope_check(service.tokens, scope, rate) for scope in SCOPES)
    asking = Asking(service.pool, service.receipts, service.config)
    figures = registry_of(service, asking)

    for path, about in ASKED.items():
        app.add_api_route(
            path,
            asking.answer,
            methods=["POST"],
            dependencies=[Depends(ask)],
            description=f"{about} Headers of the answer: X-SDFT-Release, X-SDFT-Weights, X-SDFT-Receipt.",
            tags=["ask"],
            response_model=None,
        )

    @app.get("/v1/models", dependencies=[Depends(ask)], tags=["ask"])
    async def models() -> dict[str, Any]:
        """The model, with the release that is served."""
        served = service.journal.state.served
        made = 0 if served is None else int(service.journal.state.releases[served].made)
        model = {"id": service.config.name, "object": "model", "created": made, "owned_by": "sdft", "release": served}
        return {"object": "list", "data": [model]}

    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """Whether this process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"])
    async def readyz() -> dict[str, Any]:
        """Whether an engine takes requests; 503 if none does."""
        if not service.pool.ready:
            raise ApiError(503, "not_ready", "no engine is up yet", retry_after_s=5)
        return {"status": "ready", "release": service.journal.state.served}

    @app.get("/metrics", dependencies=[Depends(operate)], tags=["operate"])
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(figures), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    @app.get("/", include_in_schema=False)
    async def page(_: Request) -> Response:
        return HTMLResponse(PAGE.read_text())

    app.include_router(teaching(service, teach))
    app.include_router(operating(service, operate))
    return app
