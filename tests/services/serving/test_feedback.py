"""Comments: which become records, what their teacher sees, and how a window trains them beside demonstrations."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config
from sdft.services.config.run import RunConfig
from sdft.services.planning.prepare import prepare
from sdft.services.serving.feedback import row_of, template_added, trained_kinds
from sdft.services.serving.receipts import Receipt
from sdft.services.serving.window import window_run
from tests.fakes.small_service import checked_service, running

MESSAGES = [{"role": "user", "content": "Turn on the light in the hall."}]


def service_of(folder: Path, method: Any = "sdft", data: dict[str, Any] | None = None, **feedback: str) -> RunConfig:
    path = folder / "service.json"
    given = {"model": "m", "method": method, "data": {"template": "turn"} | (data or {})}
    path.write_text(json.dumps(given | {"service": {"feedback": feedback}}))
    return load_config(path)


@pytest.mark.parametrize(
    ("method", "data", "feedback", "kinds", "template"),
    [
        ("sdft", {}, {}, {"comment"}, "feedback"),
        ("off_policy", {}, {}, {"comment"}, "feedback"),
        ("sdft", {}, {"comments": "counted"}, set(), None),
        ("sdft", {}, {"next_messages": "trained"}, {"comment", "next_message"}, "feedback"),
        ("sdft", {"template": "feedback"}, {}, {"comment"}, None),
        ("sdft", {"template": "none"}, {}, set(), None),
        ("sdft", {"fallback_template": "context"}, {}, set(), None),
        ("sft", {}, {}, set(), None),
        ("hindsight", {}, {}, {"comment", "next_message"}, "feedback"),
        ("hindsight", {"template": "feedback"}, {"comments": "counted"}, {"next_message"}, None),
    ],
)
def test_comments_are_trained_where_the_teacher_can_see_them(
    tmp_path: Path, method: str, data: dict[str, Any], feedback: dict[str, str], kinds: set[str], template: str | None
) -> None:
    config = service_of(tmp_path, method, data, **feedback)
    assert (trained_kinds(config), template_added(config)) == (kinds, template)


@pytest.mark.parametrize(
    ("method", "data", "said"),
    [
        ("sft", {}, "method sft trains demonstrations, and no teacher sees a comment"),
        ("sdft", {"template": "none"}, "data.template none shows the teacher the prompt alone"),
        ("sdft", {"fallback_template": "context"}, "data.fallback_template is context"),
    ],
)
def test_what_no_teacher_can_see_is_refused(tmp_path: Path, method: str, data: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as found:
        trained_kinds(service_of(tmp_path, method, data, comments="trained"))
    sentence = f"service.feedback.comments: trained is impossible, because {said}; set counted"
    assert str(found.value) == sentence


def test_hindsight_without_next_messages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"service\.feedback\.next_messages: counted leaves out what method hindsight"):
        trained_kinds(service_of(tmp_path, "hindsight", next_messages="counted"))


def test_a_window_of_hindsight_trains_next_messages_and_conversations(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, method="hindsight")
    log = [*MESSAGES, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Do it."}]
    log += [{"role": "assistant", "content": "Done."}, {"role": "user", "content": "Thanks."}]

    async def run() -> None:
        async with running(service) as client:
            answer = (
                await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
            ).json()
            body = {"receipt": answer["id"], "next_message": "Say it politely."}
            (record,) = (await client.post("/v1/feedback", json=body)).raise_for_status().json()["ids"]
            row = (await client.got(f"records/{record}"))["row"]
            assert row["feedback"].endswith("This was said about it:\nSay it politely.")
            assert len((await client.post("/v1/demonstrations", json=log_row)).raise_for_status().json()["ids"]) == 2
            refused = (await client.post("/v1/demonstrations", json={"messages": log[:2]})).json()["error"]["message"]
            assert "row 1: no user's message follows a reply, and there is no column feedback" in refused
            await client.teach("yes")
            assert (await client.release(2))["status"] == "served"

    log_row = {"messages": log}
    asyncio.run(run())
    window = service.folder.window(1)
    prepared = prepare(window_run(service.config, str(tiny_model), str(window / "train.jsonl")), window / "window.yaml")
    texts = [prepared.tokenizer.decode(p.teacher_ids) for p in prepared.stages[0].prompts if p.teacher_ids is not None]
    assert ["This was said about it:" in text for text in texts] == [True, True, True, False]
    assert [next(w for w in ("Thanks.", "Do it.") if w in text) for text in texts[1:3]] == ["Do it.", "Thanks."]


def test_the_teacher_sees_the_answer_and_the_comment() -> None:
    call = {"type": "function", "function": {"name": "setLight", "arguments": '{"room": "bath"}'}}
    answer = {"role": "assistant", "content": "Done.", "tool_calls": [call]}
    row = row_of(Receipt("chatcmpl-1", 0.0, 1, MESSAGES, [{"name": "setLight"}], answer), "The hall, not the bath.")
    assert row == {
        "prompt": MESSAGES,
        "feedback": 'The response was:\nDone.\n{"name": "setLight", "arguments": "{\\"room\\": \\"bath\\"}"}\n\n'
        "This was said about it:\nThe hall, not the bath.",
        "tools": [{"name": "setLight"}],
    }


def test_a_window_trains_comments_beside_demonstrations(tiny_model: Path, tmp_path: Path) -> None:
    service = checked_service(tmp_path, tiny_model, method="sdft", feedback={"next_messages": "counted"})

    async def run() -> tuple[str, list[str]]:
        async with running(service) as client:
            answer = (
                await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
            ).json()
            counted = await client.post("/v1/feedback", json={"receipt": answer["id"], "next_message": "And?"})
            assert counted.json() == {"ids": [], "counted": ["next_message"]}
            body = {"receipt": answer["id"], "comment": "Be polite."}
            key = {"Idempotency-Key": "c1"}
            (record,) = (await client.post("/v1/feedback", json=body, headers=key)).raise_for_status().json()["ids"]
            again = (await client.post("/v1/feedback", json=body, headers=key)).json()["ids"]
            assert again == [record]
            row = (await client.got(f"records/{record}"))["row"]
            assert (row["prompt"][0]["content"], row["receipt"]) == ("Hi", answer["id"])
            assert row["feedback"].endswith("This was said about it:\nBe polite.")
            assert (await client.got("status"))["feedback"] == {"next_message": 1, "comment": 1}
            await client.teach("yes", "yes", "yes")
            assert (await client.release(2))["status"] == "served"
            assert (await client.got(f"records/{record}"))["state"] == "trained"
            return record, [line["id"] for line in (await client.got("records"))["records"]]

    record, ids = asyncio.run(run())
    assert record in ids
    window = service.folder.window(1)
    rows = [json.loads(line) for line in (window / "train.jsonl").read_text().splitlines()]
    assert [sorted(row.keys() & {"demonstration", "feedback"}) for row in rows] == [["feedback"]] + [
        ["demonstration"]
    ] * 3
    prepared = prepare(window_run(service.config, str(tiny_model), str(window / "train.jsonl")), window / "window.yaml")
    pairs = prepared.stages[0].prompts
    texts = [prepared.tokenizer.decode(pair.teacher_ids) for pair in pairs if pair.teacher_ids is not None]
    assert len(texts) == 4
    assert ["This is feedback on an earlier response" in text for text in texts] == [True, False, False, False]
