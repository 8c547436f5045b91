"""Bad requests to a service: method, path, body, headers; then the status, the code, and a part of the sentence."""

from dataclasses import dataclass, field
from typing import Any

CHAT, TEACH, FEEDBACK = "/v1/chat/completions", "/v1/demonstrations", "/v1/feedback"
MESSAGES = [{"role": "user", "content": "Hi"}]
JSONL = {"Content-Type": "application/jsonl"}


@dataclass(frozen=True)
class Bad:
    method: str
    path: str
    body: Any  # bytes are sent as they are, None is no body
    status: int
    said: str
    code: str | None = None  # None: the error is vLLM's own, which numbers its codes
    headers: dict[str, str] = field(default_factory=dict)


def row(**fields: Any) -> dict[str, Any]:
    return {"prompt": "Hi", "demonstration": "Ho"} | fields


BAD = [
    Bad("POST", CHAT, b"", 400, "the body is empty", "empty_body"),
    Bad("POST", CHAT, b"{", 400, "the body is not JSON", "not_json"),
    Bad("POST", CHAT, b"\xff{}", 400, "not UTF-8 (byte 1)", "not_utf8"),
    Bad("POST", CHAT, b"[]", 400, "must be a JSON object", "not_an_object"),
    Bad("POST", CHAT, b'{"model": "sdft", "model": "x"}', 400, 'the key "model" is given twice', "not_json"),
    Bad("POST", CHAT, b'{"temperature": NaN}', 400, "NaN is not a JSON number", "not_json"),
    Bad("POST", CHAT, b"[" * 100_000, 400, "the body is not JSON", "not_json"),
    Bad("POST", CHAT, {"model": "sdft"}, 400, "messages"),
    Bad("POST", CHAT, {"model": "gpt", "messages": MESSAGES}, 404, "gpt"),
    Bad("POST", CHAT, {"model": "sdft", "messages": "Hi"}, 400, "messages"),
    Bad("POST", CHAT, {"model": "sdft", "messages": []}, 400, ""),
    Bad("POST", CHAT, {"model": "sdft", "messages": MESSAGES, "temperature": -1}, 400, "temperature"),
    Bad("POST", CHAT, {"model": "sdft", "messages": MESSAGES, "max_tokens": 0}, 400, "max_tokens"),
    Bad("POST", CHAT, {"model": "sdft", "messages": MESSAGES, "top_p": 7}, 400, "top_p"),
    Bad("POST", CHAT, {"model": "sdft", "messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, 400, "logprobs"),
    Bad("POST", CHAT, {"model": "sdft", "messages": [{"role": "user", "content": "a " * 3000}]}, 400, "context length"),
    Bad("POST", CHAT, b" " * (3 << 20), 413, "larger than 2 MiB", "body_too_large"),
    Bad("GET", CHAT, None, 405, "does not take GET", "method_not_allowed"),
    Bad("POST", "/v1/completions", {"model": "sdft", "prompt": "x", "max_tokens": "many"}, 400, "max_tokens"),
    Bad("POST", "/v1/embeddings", {"model": "sdft", "input": "x"}, 404, "there is no /v1/embeddings", "not_found"),
    Bad("POST", "/sdft/release", {"release": 1}, 404, "there is no /sdft/release", "not_found"),
    Bad("POST", TEACH, b"", 400, "the body is empty", "empty_body"),
    Bad("POST", TEACH, b"{]", 400, "the body is not JSON: ", "not_json"),
    Bad("POST", TEACH, [], 422, "there is no demonstration", "no_rows"),
    Bad("POST", TEACH, 3, 422, "row 1: the row is not an object", "bad_rows"),
    Bad("POST", TEACH, {"demonstration": "Ho"}, 422, "row 1: prompt is missing", "bad_rows"),
    Bad("POST", TEACH, [row(), {"prompt": "Hi"}], 422, "row 2: demonstration is missing", "bad_rows"),
    Bad("POST", TEACH, row(prompt=" "), 422, "row 1: prompt", "bad_rows"),
    Bad("POST", TEACH, row(prompt=7), 422, "row 1: prompt", "bad_rows"),
    Bad("POST", TEACH, row(prompt=[{"role": "boss", "content": "x"}]), 422, "role must be one of", "bad_rows"),
    Bad("POST", TEACH, row(prompt=[{"role": "assistant", "content": "x"}]), 422, "row 1: prompt", "bad_rows"),
    Bad("POST", TEACH, row(prompt="long " * 500), 422, "tokens", "bad_rows"),
    Bad("POST", TEACH, row(demonstration="long " * 500), 422, "tokens", "bad_rows"),
    Bad("POST", TEACH, row(prompt="a\x00"), 422, "row 1: prompt", "bad_rows"),
    Bad(
        "POST", TEACH, b'{"prompt": "Hi"\n{"prompt": "Ho"}\n', 422, "line 1: the JSON ends too early", "bad_rows", JSONL
    ),
    Bad("POST", TEACH, b'{"prompt": "\xff"}\n', 422, "line 1: byte", "bad_rows", JSONL),
    Bad("POST", TEACH, b"\n\n", 422, "there is no demonstration", "no_rows", JSONL),
    Bad("POST", TEACH, b"{}\n" * 10_001, 422, "10001 rows; send at most 10000", "too_many_rows", JSONL),
    Bad("POST", TEACH, b"a=b", 415, "not text/csv", "bad_content_type", {"Content-Type": "text/csv"}),
    Bad("POST", TEACH, row(), 422, "Idempotency-Key must have 1 to 255", "bad_key", {"Idempotency-Key": "k" * 256}),
    Bad("POST", TEACH, b" " * (3 << 20), 413, "larger than 2 MiB", "body_too_large"),
    Bad("POST", FEEDBACK, {}, 422, "receipt must be the id", "no_receipt"),
    Bad("POST", FEEDBACK, {"receipt": "x"}, 422, "give exactly one of", "one_kind"),
    Bad("POST", FEEDBACK, {"receipt": "x", "score": 1, "comment": "y"}, 422, "give exactly one of", "one_kind"),
    Bad("POST", FEEDBACK, {"receipt": "x", "score": 1}, 404, "there is no receipt x", "unknown_receipt"),
    Bad("POST", FEEDBACK, {"receipt": "x", "answer": 1}, 422, "'answer' is not a field", "unknown_field"),
    Bad("POST", FEEDBACK, b'{"receipt": "\\ud800", "score": 1}', 422, "receipt must be the id", "no_receipt"),
    Bad("POST", FEEDBACK, b'{"receipt": "x", "\\ud800": 1}', 422, "is not a field", "unknown_field"),
    Bad("POST", TEACH, b'{"prompt": "a", "demonstration": "b", "answer": 1e999}', 422, "cannot be kept", "bad_rows"),
    Bad("POST", TEACH, b'{"prompt": "a", "demonstration": "\\ud800"}', 422, "row 1: demonstration", "bad_rows"),
    Bad(
        "POST",
        TEACH,
        b'{"prompt": "a", "demonstration": "b"}',
        415,
        "not nothing",
        "bad_content_type",
        {"Content-Type": ""},
    ),
    Bad("GET", f"/v1/records/rec-{'9' * 5000}", None, 404, "there is no record", "unknown_record"),
    Bad("GET", "/v1/records?before=x", None, 404, "there is no record x", "unknown_record"),
    Bad("GET", "/v1/records", None, 403, "answers on loopback only", "wrong_host", {"Host": "evil.example"}),
    Bad("POST", TEACH, row(), 403, "a page of another site", "other_site", {"Origin": "http://evil.example"}),
    Bad("POST", "/v1/releases/1/pin", None, 403, "another site", "other_site", {"Sec-Fetch-Site": "cross-site"}),
    Bad("POST", CHAT, {"model": "sdft"}, 403, "a page of another site", "other_site", {"Origin": "null"}),
    Bad("POST", FEEDBACK, [1], 400, "must be a JSON object", "not_an_object"),
    Bad("GET", "/v1/records/rec-999", None, 404, "there is no record rec-999", "unknown_record"),
    Bad("GET", "/v1/records/12", None, 404, "there is no record 12", "unknown_record"),
    Bad("DELETE", "/v1/records/rec-x", None, 404, "there is no record rec-x", "unknown_record"),
    Bad("GET", "/v1/records?limit=0", None, 422, "query.limit", "invalid_parameter"),
    Bad("GET", "/v1/records?state=learnt", None, 422, "learnt is no state", "unknown_state"),
    Bad("GET", "/v1/releases/77", None, 404, "there is no release 77", "unknown_release"),
    Bad("GET", "/v1/releases/one", None, 422, "path.release", "invalid_parameter"),
    Bad("POST", "/v1/releases/77/pin", None, 404, "there is no release 77", "unknown_release"),
    Bad("POST", "/v1/releases/77/rollback", None, 404, "there is no release 77", "unknown_release"),
    Bad("POST", "/v1/releases/1/promote", None, 409, "release 1 is served already", "not_possible"),
    Bad("POST", "/v1/windows/9/retry", None, 409, "there is no window 9", "not_possible"),
    Bad("PUT", "/v1/releases", None, 405, "does not take PUT", "method_not_allowed"),
]
