"""Demonstrations, feedback and records: what applications teach, and what became of it."""

import asyncio
import math
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse

from sdft.services.data.rows import BadRow, parse_line
from sdft.services.inbox.inbox import KeyUsed, NotWritten
from sdft.services.inbox.lines import Unwritable
from sdft.services.records.ledger_reading import trained_steps
from sdft.services.releases.state import STATES
from sdft.services.serving.feedback import KEYS, row_of
from sdft.services.serving.http.errors import ApiError
from sdft.services.serving.http.requests import body_of, json_of_body, object_of_body
from sdft.services.serving.window import record_name, record_number

if TYPE_CHECKING:
    from sdft.services.serving.service import Service

JSONL = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines")
MOST_ROWS = 10_000  # of one request
SMALL, FEW = 16_384, 8  # bytes and rows of a body that is checked at once: a thread would take longer
LONGEST_KEY = 255
MOST_PROBLEMS = 20  # bad rows that one answer names
SHOWN = 200  # last characters of a prompt that a list shows
FEEDBACK = ("correction", "comment", "score", "next_message")


def teaching(service: "Service", check: Callable[[Request], object]) -> APIRouter:
    """Return the routes. check: of a request's token."""
    routes = APIRouter(dependencies=[Depends(check)], tags=["teach"])

    @routes.post("/v1/demonstrations", status_code=202)
    async def add_demonstrations(request: Request) -> JSONResponse:
        """Take demonstrations: an object, a list of objects, or JSON lines.

        Each is a row as in a run's file: `prompt` (text or messages), `demonstration`, and what the template shows.
        With `method: hindsight` it may be a conversation: each reply that a user's message follows is a record. All are
        taken or none. The answer comes when they are on the disk. With `Idempotency-Key` the same request counts once.
        """
        body = await body_of(request, service.http.max_body_mib)
        return await _take(_rows(request, body), body, request, "demonstrations")

    @routes.post("/v1/feedback", status_code=202)
    async def add_feedback(request: Request) -> JSONResponse:
        """Take feedback to an answer: the `id` of the answer as `receipt`, and one kind of feedback.

        A `correction` is what the answer should have been, as text or as an assistant's message: it becomes a
        demonstration for that prompt. A `score` of at least `service.feedback.good_score` makes the answer itself one.
        A `comment` becomes a record whose teacher sees the answer and the comment, as `service.feedback.comments` says,
        and so does the user's `next_message`. What becomes no record is kept and counted.
        """
        if service.receipts is None:
            raise ApiError(409, "no_receipts", "this service keeps no receipts (service.receipts.keep: false)")
        body = await body_of(request, service.http.max_body_mib)
        given = object_of_body(body)
        unknown = [key for key in given if key not in ("receipt", *FEEDBACK)]
        if unknown:
            raise ApiError(422, "unknown_field", f"{unknown[0]!a} is not a field; give receipt and one of {FEEDBACK}")
        said = {kind: given[kind] for kind in FEEDBACK if given.get(kind) is not None}
        name = given.get("receipt")
        if not isinstance(name, str) or not name.isascii() or not 1 <= len(name) <= LONGEST_KEY:
            raise ApiError(422, "no_receipt", "receipt must be the id of an answer")
        if len(said) != 1:
            raise ApiError(422, "one_kind", f"give exactly one of {', '.join(FEEDBACK)}")
        ((kind, value),) = said.items()
        receipt = await service.receipts.find(name)
        if receipt is None:
            raise ApiError(404, "unknown_receipt", f"there is no receipt {name}, or its time is over")
        if kind != "correction":
            _check_value(kind, value)
            good = service.config.feedback.good_score
            kept = good is not None and value >= good if kind == "score" else kind in service.trained_feedback
            if not kept or receipt.messages is None or (kind in KEYS and receipt.messages[-1]["role"] == "assistant"):
                await service.receipts.note(name, kind, value, _key(request))
                return JSONResponse({"ids": [], "counted": [kind]}, 202)
        if receipt.messages is None:
            raise ApiError(
                422, "no_messages", "this answer completes a plain text; post a demonstration with its prompt instead"
            )
        if kind in KEYS:
            row = row_of(receipt, value)
        else:
            shown = receipt.demonstration if kind == "score" else value
            row = {"prompt": receipt.messages, "demonstration": shown}
            row |= {"tools": receipt.tools} if receipt.tools else {}
        try:
            answer = await _take([row], body, request, "feedback", receipt=receipt.id)
        except ApiError as error:
            if kind not in KEYS or error.code != "bad_rows":
                raise
            await service.receipts.note(name, kind, value, _key(request))
            return JSONResponse({"ids": [], "counted": [kind]}, 202)  # it is too long, or has what no window takes
        with suppress(sqlite3.Error):  # the record is taken: only the count may lack it
            await service.receipts.note(name, kind, value, _key(request))
        return answer

    async def _take(
        rows: list[Any], body: bytes, request: Request, name: str, receipt: str | None = None
    ) -> JSONResponse:
        key = _key(request)
        if len(service.records.waiting()) + len(rows) > service.http.max_waiting:
            text = f"{service.http.max_waiting} records wait already (service.http.max_waiting); send it again later"
            raise ApiError(429, "queue_full", text, retry_after_s=60)
        taken = await service.check(rows, name, receipt is None and len(body) <= SMALL and len(rows) <= FEW)
        if taken.problems:
            first, count = taken.problems[0], len(taken.problems)
            more = f" (and {count - 1} more)" if count > 1 else ""
            text = f"nothing was taken: row {first['row']}: {first['message']}{more}"
            raise ApiError(422, "bad_rows", text, taken.problems[:MOST_PROBLEMS])
        kept = [row | {"receipt": receipt} for row in taken.rows] if receipt is not None else taken.rows
        try:
            ids = await service.inbox.add(kept, body, key)
        except KeyUsed as error:
            raise ApiError(409, "key_used", str(error)) from None
        except Unwritable as error:
            raise ApiError(422, "bad_rows", f"nothing was taken: {error}") from None
        except NotWritten as error:
            raise ApiError(507, "disk_full", f"nothing was taken: {error}; make room, and send it again") from None
        service.decisions.changed.set()
        return JSONResponse({"ids": [record_name(i) for i in ids]}, 202)

    @routes.get("/v1/records")
    async def list_records(
        state: str | None = None, limit: int = Query(50, ge=1, le=1000), before: str | None = None
    ) -> dict[str, Any]:
        """The newest records, or those in one state, and how many there are in each state."""
        if state is not None and state not in STATES:
            raise ApiError(422, "unknown_state", f"{state} is no state; the states are {', '.join(STATES)}")
        first = len(service.inbox.records) if before is None else _number(service, before)
        found: list[dict[str, Any]] = []
        for number in range(first - 1, -1, -1):
            if len(found) == limit:
                break
            if state is None or service.record_state(number).state == state:
                found.append(_record(service, number))
        return {"records": found, "counts": service.records.counts()}

    @routes.get("/v1/records/{record}")
    async def get_record(record: str) -> dict[str, Any]:
        """A record, and what became of it: waiting, in window, trained, held out, dropped, quarantined or deleted."""
        number = _number(service, record)
        row, state = _record(service, number), service.journal.state
        row["row"] = service.inbox.records[number].row
        window = state.windows.get(row.get("window", 0))
        if window is not None:
            trained = [*window.train, *window.replayed]
            steps = await asyncio.to_thread(trained_steps, service.folder.run(window.number))
            row["steps"] = steps.get(trained.index(number), []) if number in trained else []
        return row

    @routes.delete("/v1/records/{record}")
    async def delete_record(record: str) -> dict[str, Any]:
        """Do not train a record from now on. If it was trained, the answer names the releases that have it.

        If an open window has the record, the window ends, and its other records wait for the next one.
        """
        number = _number(service, record)
        try:
            await service.inbox.delete(number)
        except NotWritten as error:
            raise ApiError(507, "disk_full", f"nothing was deleted: {error}; make room, and send it again") from None
        await service.decisions.forget(number)
        return _record(service, number)

    return routes


def _rows(request: Request, body: bytes) -> list[Any]:
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in JSONL:
        rows: list[Any] = []
        for number, line in enumerate(body.split(b"\n"), start=1):
            if line.strip():
                row = parse_line(line)
                if isinstance(row, BadRow):
                    raise ApiError(422, "bad_rows", f"nothing was taken: line {number}: {row}")
                rows.append(row)
    elif kind == "application/json":
        value = json_of_body(body)
        rows = value if isinstance(value, list) else [value]
    else:
        raise ApiError(415, "bad_content_type", f"send application/json or application/jsonl, not {kind or 'nothing'}")
    if not rows:
        raise ApiError(422, "no_rows", "there is no demonstration in the body")
    if len(rows) > MOST_ROWS:
        raise ApiError(422, "too_many_rows", f"{len(rows)} rows; send at most {MOST_ROWS} at once")
    return rows


def _number(service: "Service", record: str) -> int:
    number = record_number(record)
    if number is None or number >= len(service.inbox.records):
        raise ApiError(404, "unknown_record", f"there is no record {record}")
    return number


def _record(service: "Service", number: int) -> dict[str, Any]:
    record, now = service.inbox.records[number], service.record_state(number)
    row: dict[str, Any] = {"id": record_name(number), "state": now.state, "received": record.at}
    row |= {key: value for key, value in vars(now).items() if key != "state" and value not in (None, "")}
    row |= {"deleted": number in service.inbox.deleted, "releases": service.journal.state.in_releases(number)}
    return row | {"prompt": str(record.row["prompt"][-1]["content"])[-SHOWN:]}


def _key(request: Request) -> str | None:
    key = request.headers.get("Idempotency-Key")
    if key is not None and not 1 <= len(key) <= LONGEST_KEY:
        raise ApiError(422, "bad_key", f"Idempotency-Key must have 1 to {LONGEST_KEY} characters")
    return key


def _check_value(kind: str, value: Any) -> None:
    """Raise ApiError 422 unless a comment or next message is text, and a score a finite number."""
    if kind == "score":
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ApiError(422, "bad_feedback", "score must be a number")
    elif not isinstance(value, str) or not value.strip():
        raise ApiError(422, "bad_feedback", f"{kind} must be text")
