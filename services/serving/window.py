"""The folder of a window: what it trains, what the gate asks, and the configuration of its run.

inbox, state ─► draw: new records, some held out, some of earlier windows ─► Opened
Opened       ─► write: train.jsonl, held-out-*.jsonl, window.yaml
"""

import hashlib
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdft.actors.config import TURN_ENGINE
from sdft.services.base.files import write_atomically
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.config.load import resolved_yaml
from sdft.services.config.run import RunConfig
from sdft.services.config.service import WindowConfig
from sdft.services.grading.graders import GRADERS
from sdft.services.grading.graders.tool_call import parse_calls
from sdft.services.inbox.inbox import Inbox
from sdft.services.inbox.lines import Received
from sdft.services.releases.events import Opened
from sdft.services.releases.state import ServiceState, Window
from sdft.services.serving.feedback import template_added
from sdft.services.serving.folder import ServiceFolder

NEW, EARLIER = "held-out-new", "held-out-earlier"  # evaluation sets: of this window, of earlier ones


class ConfigurationChanged(Exception):
    """The run of a window has begun with another configuration than the service has now."""


def kept_sets(config: RunConfig) -> set[str]:
    """Return the names of the sets that a window does not train on, whose answers should keep their form."""
    return {EARLIER, *(s.name for s in config.sets if s.role == "retention")}


def record_name(record: int) -> str:
    return f"rec-{record}"


def record_number(name: str) -> int | None:
    """Return the number of a record from its name; None if it is not the name of one."""
    number = name.removeprefix("rec-")
    return int(number) if name != number and number.isascii() and number.isdecimal() and len(number) < 19 else None


def waiting(state: ServiceState, records: list[Received], deleted: set[int]) -> list[int]:
    """Return the records that no window has trained, the oldest first."""
    return [r.id for r in records if state.record(r.id, r.id in deleted).state == "waiting"]


def draw(window: WindowConfig, state: ServiceState, records: list[Received], deleted: set[int], seed: int) -> Opened:
    """Return the next window: its new records, those of them that are held out, and records of earlier windows.

    The records of a part of a refused window come first, alone. A prompt is always on the same side, so no held-out
    prompt is trained under another record.
    """
    new = waiting(state, records, deleted)
    of_part = next((ids for part in state.parts if (ids := [i for i in part if i in set(new)])), None)
    new = of_part or new[: window.max_records]
    held_out = [i for i in new if _is_held_out(records[i], window)]
    train = [i for i in new if i not in set(held_out)]
    if not train:
        train, held_out = new, []
    number = max(state.windows, default=0) + 1
    earlier = [r.id for r in records if state.record(r.id, r.id in deleted).state == "trained" and r.id not in deleted]
    count = min(len(earlier), round(len(train) * window.replay / (1 - window.replay)))
    replayed = sorted(random.Random(f"{seed}/{number}").sample(earlier, count))
    assert state.served is not None
    return Opened(number, state.served, train, held_out, replayed, time.time())


def _is_held_out(record: Received, window: WindowConfig) -> bool:
    prompt = json.dumps(record.row["prompt"], sort_keys=True).encode()
    share = int.from_bytes(hashlib.sha256(prompt).digest()[:4], "big") / 2**32
    # A comment has no answer to ask for. It is held out with its prompt, which another record may ask.
    asked = "demonstration" not in record.row or answer_of(record.row, window) is not None
    return share < window.held_out and asked


def answer_of(row: dict[str, Any], window: WindowConfig) -> Any:
    """Return the right answer to a record's prompt for the grader of held-out records; None if it has none.

    It is the column answer, else it is made of the demonstration.
    """
    answer = row.get("answer")
    if answer is None:
        demonstration = row.get("demonstration")
        if not isinstance(demonstration, str):
            return None
        answer = demonstration.strip()
        if window.grader == "tool_call":
            calls = parse_calls(demonstration)
            answer = [{"Action": call.name, "Action_Input": call.arguments} for call in calls or []]
    try:
        json.dumps(answer, allow_nan=False)  # a call may have a number that is not finite
    except ValueError:
        return None
    return answer if GRADERS[window.grader].check_answer(answer) is None else None


def write_window(
    folder: ServiceFolder, of: Window, config: RunConfig, state: ServiceState, inbox: Inbox, model: Path
) -> Path:
    """Write the folder of a window, or write it again; return its configuration.

    config: of the service, with absolute paths. model: the folder of the release that the window starts from. Raises
    ConfigurationChanged if the window's run has begun with another configuration.
    """
    assert config.service is not None
    window, path, records = config.service.window, folder.window(of.number), inbox.records
    path.mkdir(parents=True, exist_ok=True)
    trained = [records[i] for i in (*of.train, *of.replayed)]
    write_atomically(path / "train.jsonl", _lines(_trained(r) for r in trained))
    earlier = [
        i
        for w in state.windows.values()
        if w.release in state.lineage
        for i in w.held_out
        if i not in inbox.deleted and answer_of(records[i].row, window) is not None
    ]
    sets = []
    new = [i for i in of.held_out if answer_of(records[i].row, window) is not None]
    for name, ids in ((NEW, new), (EARLIER, earlier)):
        if not ids:
            continue
        file = path / f"{name}.jsonl"
        write_atomically(file, _lines(_question(records[i], window) for i in ids))
        longest = window.max_new_tokens or config.sampling.max_new_tokens
        sets.append(EvaluationSet(name=name, file=str(file), grader=window.grader, max_new_tokens=longest))
    first = str(folder.path / state.releases[min(state.releases)].folder)
    run = resolved_yaml(window_run(config, str(model), str(path / "train.jsonl"), sets, first)).encode()
    written = path / "window.yaml"
    if written.exists() and written.read_bytes() != run and (folder.run(of.number) / "config.yaml").exists():
        raise ConfigurationChanged("its run has begun with another configuration than the service has now")
    write_atomically(written, run)
    return written


def window_run(
    config: RunConfig, model: str, train: str, sets: Iterable[EvaluationSet] = (), first: str | None = None
) -> RunConfig:
    """Return the configuration of a window's run from that of the service. first: folder of the first release."""
    given = config.model_dump(mode="json")
    given |= {"service": None, "model": model, "run_dir": None}
    if config.teacher.weights == "base" and first is not None:  # the first model of the service, in every window
        given["teacher"] |= {"weights": "external", "model": first}
    given["data"]["train"] = train
    given["data"]["fallback_template"] = template_added(config) or given["data"]["fallback_template"]
    if config.service is not None and config.service.serving.turns:
        for pool in config.actors.pools:
            given["actors"][pool] |= {"engine": TURN_ENGINE, "gpus": 0}
    given["evaluation"]["sets"] += [s.model_dump(mode="json") for s in sets]
    given["evaluation"]["record"] = True
    return RunConfig.model_validate(given)


def _trained(record: Received) -> dict[str, Any]:
    kept = {name: value for name, value in record.row.items() if name not in ("receipt", "given_id", "answer")}
    return kept | {"id": record_name(record.id)}


def _question(record: Received, window: WindowConfig) -> dict[str, Any]:
    kept = {name: record.row[name] for name in ("prompt", "tools") if record.row.get(name) is not None}
    return kept | {"id": record_name(record.id), "answer": answer_of(record.row, window)}


def _lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
