"""docs/api.md and openapi.json, made from the application.

python -m sdft.services.serving.http.reference > docs/api.md
"""

from types import SimpleNamespace
from typing import Any, cast

from sdft.services.config.service import HttpConfig, ServiceConfig
from sdft.services.serving.http.app import make_app
from sdft.services.serving.http.teach import FEEDBACK, MOST_ROWS
from sdft.services.serving.service import Service

HEAD = f"""# The interface of a service

`sdft serve` answers at `service.http.host` and `port`. This page is made from the program:
`python -m sdft.services.serving.http.reference`. The service itself has `/openapi.json`.

With `service.http.tokens` each request needs a token with the scope in the table: `Authorization: Bearer TOKEN`.

An answer of the model has three headers. `X-SDFT-Release` is the release that gave it, from its first token to its
last. `X-SDFT-Weights` names the window and the step that it was trained by. `X-SDFT-Receipt` is the `id` of the answer,
to which feedback refers. `/v1/messages` has no receipt.

Feedback is one of {", ".join(f"`{k}`" for k in FEEDBACK)}. A correction is text, or an assistant's message with
`tool_calls`. A request may have {MOST_ROWS} demonstrations at most. All of them are taken, or none.

An error has the form of OpenAI's API. `code` is for programs. `problems` lists bad rows, each with its number.

    {{"error": {{"message": "nothing was taken: row 2: demonstration is missing (the row has prompt)",
               "type": "invalid_request_error", "code": "bad_rows", "param": null,
               "problems": [{{"row": 2, "message": "demonstration is missing (the row has prompt)"}}]}}}}

| status | codes |
|---|---|
| 400 | `empty_body`, `not_utf8`, `not_json`, `not_an_object`; parameters of the model (vLLM's own sentences) |
| 401, 403 | `missing_token`, `unknown_token`; `wrong_scope` |
| 404, 405 | `not_found`, `unknown_record`, `unknown_release`, `unknown_receipt`; `method_not_allowed` |
| 408 | `slow_body` |
| 409 | `key_used`, `no_receipts`, `not_possible` |
| 413, 415 | `body_too_large`; `bad_content_type` |
| 422 | `bad_rows`, `no_rows`, `too_many_rows`, `bad_key` |
| 422 | `no_receipt`, `one_kind`, `unknown_field`, `no_messages`; `unknown_state`, `invalid_parameter` |
| 429 | `too_many_requests`, `too_fast`, `queue_full`, with `Retry-After` |
| 503, 504 | `no_engine`, `engine_lost`, `not_ready`, `not_changed`; `timeout` |
| 507 | `disk_full`: nothing was taken |
"""
SCOPES = {"ask": "ask", "teach": "teach", "operate": "operate", "health": "none"}


def schema() -> dict[str, Any]:
    """Return the OpenAPI description of a service."""
    parts = SimpleNamespace(tokens=None, pool=None, receipts=None, config=ServiceConfig(), http=HttpConfig())
    return make_app(cast(Service, parts)).openapi()


def page() -> str:
    """Return the whole page."""
    lines = [HEAD, "| request | scope | |", "|---|---|---|"]
    for path, methods in schema()["paths"].items():
        for method, what in methods.items():
            about = " ".join(what.get("description", "").split()).replace("|", "\\|")
            lines.append(f"| `{method.upper()} {path}` | {SCOPES[what['tags'][0]]} | {about} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
