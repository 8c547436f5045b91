"""The agent example: requests that need two or three calls, of which the later ones need what the first has returned.

`tasks.yaml` has the requests. A request names a person or an event, and the home (home.py) of its row knows where and
when: the prompt does not say it. The demonstration is the right calls and the home's answers. Each is played in the
home, and a row whose calls do not lead to the wanted state is an error. `train.jsonl` holds 140 rows, `heldout.jsonl`
70. Both have the same tools and kinds of request; no wording and no value (name, title, room, time, number) is in both.

`python -m examples.agent.make_data [FOLDER]`, in the root of the repository, writes both files into FOLDER (default:
the script's own folder), the same bytes each time.
"""

import asyncio
import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from examples.agent.home import SYSTEM, Home
from sdft.services.environments.base import Done

SEED = 2026
ROWS_PER_WORDING = {"train": 4, "heldout": 5}
OTHERS = 2  # further events and people of a home
DONE = "Done."


def main(folder: Path) -> None:
    """Write train.jsonl and heldout.jsonl into `folder`."""
    description = yaml.safe_load((Path(__file__).parent / "tasks.yaml").read_text(encoding="utf-8"))
    for split in ("train", "heldout"):
        rows = make_rows(description, split)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_bytes("".join(lines).encode())


def make_rows(description: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Every wording of every task, ROWS_PER_WORDING times with values of the split, in a seeded order."""
    rng = random.Random(f"{SEED} {split}")
    values = {kind: by_split[split] for kind, by_split in description["values"].items()}
    rows: dict[str, dict[str, Any]] = {}  # by request, so that none comes twice
    for task in description["tasks"]:
        for wording in task[split]:
            wanted = len(rows) + ROWS_PER_WORDING[split]
            while len(rows) < wanted:
                row = make_row(rng, task, wording, values)
                rows.setdefault(row["prompt"][-1]["content"], row)
    ordered = list(rows.values())
    rng.shuffle(ordered)
    return [{"id": f"agent-{split}-{number:03d}", **row} for number, row in enumerate(ordered)]


def make_row(rng: random.Random, task: dict[str, Any], wording: str, values: dict[str, list[Any]]) -> dict[str, Any]:
    """The row without its id."""
    events = rng.sample(values["event"], 1 + OTHERS)
    people = rng.sample(values["person"], 1 + OTHERS)
    rooms = rng.sample(values["room"], 1 + OTHERS)
    hours = rng.sample(values["hour"], 1 + OTHERS)
    times = [f"{hour}:{rng.choice(values['minute'])}" for hour in hours]
    drawn = {kind: rng.choice(values[kind]) for kind in ("song", "degrees", "percent")}
    drawn |= {"event": events[0], "person": people[0], "time": times[0], "there": rooms[0]}
    places = [list(place) for place in zip(times, rooms, strict=True)]
    answer = {
        "events": dict(sorted(zip(events, places, strict=True))),
        "people": dict(sorted(zip(people, rooms, strict=True))),
        "wanted": {key.format(**drawn): typed(value.format(**drawn)) for key, value in task["wanted"].items()},
    }
    calls = [call.format(**drawn) for call in task["calls"]]
    request = f"Task: {wording.format(**drawn)}"
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": request}]
    return {"prompt": prompt, "demonstration": played(calls, answer), "answer": answer}


def typed(value: str) -> str | int:
    return int(value) if value.isdigit() else value


def played(calls: list[str], answer: dict[str, Any]) -> list[dict[str, str]]:
    """The calls and the home's answers as messages. ValueError unless they fulfil the request."""

    async def play() -> list[dict[str, str]]:
        home, messages = Home(), list[dict[str, str]]()
        await home.reset({"answer": answer})
        for call in calls:
            said = await home.step(call)
            if not isinstance(said, str):
                raise ValueError(f"{call} is no call")
            messages += [{"role": "assistant", "content": call}, {"role": "user", "content": said}]
        end = await home.step(DONE)
        if not isinstance(end, Done) or not end.passed:
            raise ValueError(f"{calls} do not fulfil the request: {end}")
        return [*messages, {"role": "assistant", "content": DONE}]

    return asyncio.run(play())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
