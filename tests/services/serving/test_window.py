"""Windows: which records they train, which they hold out, and the files that they are trained from."""

import json
from pathlib import Path

import pytest

from sdft.services.config.load import load_config
from sdft.services.config.service import WindowConfig
from sdft.services.inbox.inbox import Inbox
from sdft.services.inbox.lines import Received
from sdft.services.releases.events import Candidate, Opened, Refused, Served
from sdft.services.releases.state import ServiceState
from sdft.services.serving.folder import ServiceFolder
from sdft.services.serving.window import (
    ConfigurationChanged,
    answer_of,
    draw,
    record_name,
    record_number,
    waiting,
    write_window,
)

CALL = 'Action: setLight\nAction Input: {"room": "hall"}'


def records(count: int, demonstration: str = "Yes.") -> list[Received]:
    return [
        Received(i, None, "", 0.0, {"prompt": f"Question {i}?", "demonstration": demonstration}) for i in range(count)
    ]


def begun() -> ServiceState:
    state = ServiceState()
    state.apply(Candidate(1, None, "/model", {}, 0, {}, 0.0))
    state.apply(Served(1, "start", 0.0))
    return state


def trained(state: ServiceState, opened: Opened) -> None:
    state.apply(opened)
    release = opened.window + 1
    state.apply(Candidate(release, opened.window, f"releases/{release}", {}, 1, {}, 0.0))
    state.apply(Served(release, "gate", 0.0))


def test_every_new_record_is_trained_or_held_out() -> None:
    opened = draw(WindowConfig(held_out=0.3), begun(), records(200), {7}, seed=0)
    assert sorted([*opened.train, *opened.held_out]) == [i for i in range(200) if i != 7]
    assert 40 <= len(opened.held_out) <= 80
    again = draw(WindowConfig(held_out=0.3), begun(), records(200), {7}, seed=0)
    assert (opened.train, opened.held_out) == (again.train, again.held_out)


def test_a_prompt_is_always_on_the_same_side() -> None:
    twice = [Received(r.id + 50 * k, None, "", 0.0, r.row) for k in range(2) for r in records(50)]
    opened = draw(WindowConfig(held_out=0.3), begun(), twice, set(), seed=0)
    assert {i % 50 for i in opened.train}.isdisjoint(i % 50 for i in opened.held_out)


def test_no_record_is_held_out_if_nothing_else_is_left() -> None:
    opened = draw(WindowConfig(held_out=0.99), begun(), records(3), set(), seed=0)
    assert (opened.train, opened.held_out) == ([0, 1, 2], [])


def test_a_share_is_replayed() -> None:
    state, settings = begun(), WindowConfig(held_out=0.0, replay=0.25, max_records=30)
    everything = records(60)
    trained(state, draw(settings, state, everything, set(), seed=0))
    second = draw(settings, state, everything, {0, 1}, seed=0)
    assert len(second.train) == 30
    assert len(second.replayed) == 10  # a quarter of 40
    assert set(second.replayed) <= set(range(2, 30))  # deleted records are not replayed
    assert second.parent == 2


def test_parts_of_a_refused_window_come_first_and_alone() -> None:
    state = begun()
    state.apply(Opened(1, 1, [0, 1, 2, 3], [], [], 0.0))
    state.apply(Candidate(2, 1, "x", {}, 1, {}, 0.0))
    state.apply(Refused(2, "gate", "worse", [[0, 1], [2, 3]], 0.0))
    settings = WindowConfig(held_out=0.0)
    assert draw(settings, state, records(9), set(), seed=0).train == [0, 1]
    assert draw(settings, state, records(9), {0, 1}, seed=0).train == [2, 3]
    assert waiting(state, records(9), {8}) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_answers_of_records() -> None:
    calls = WindowConfig(grader="tool_call")
    assert answer_of({"demonstration": CALL}, calls) == [{"Action": "setLight", "Action_Input": {"room": "hall"}}]
    assert answer_of({"demonstration": "I cannot."}, calls) is None
    assert answer_of({"demonstration": "Yes. "}, WindowConfig()) == "Yes."
    assert answer_of({"demonstration": "Yes.", "answer": "yes"}, WindowConfig()) == "yes"
    assert answer_of({"demonstration": {"role": "assistant", "tool_calls": []}}, WindowConfig()) is None


def test_names_of_records() -> None:
    assert record_number(record_name(12)) == 12
    assert [record_number(name) for name in ("12", "rec-", "rec-x", "rec--1", "rec-1.0")] == [None] * 5


def test_the_files_of_a_window(tmp_path: Path) -> None:
    model, (sets, path) = tmp_path / "model", (tmp_path / "eval.jsonl", tmp_path / "my.yaml")
    model.mkdir()
    sets.write_text('{"prompt": "?", "answer": "!"}\n')
    path.write_text(
        f"model: {model}\ntraining: {{batch_size: 2}}\nservice: {{window: {{epochs: 3}}}}\n"
        f"evaluation: {{sets: [{{name: own, file: {sets}, grader: exact}}]}}\n"
    )
    config, folder, state = load_config(path), ServiceFolder(tmp_path), begun()
    assert config.teacher.weights == "base"
    assert config.service is not None
    everything = records(40)
    first = draw(config.service.window, state, everything[:20], set(), seed=0)
    trained(state, first)
    second = draw(config.service.window, state, everything, set(), seed=0)
    state.apply(second)
    inbox = Inbox(folder.inbox)
    inbox.records += everything
    inbox.deleted.add(first.held_out[0])
    written = write_window(folder, state.windows[2], config, state, inbox, model)
    made = load_config(written)
    assert (made.model, made.training.epochs, made.service) == (str(model), 3, None)
    assert (made.teacher.weights, made.teacher.model) == ("external", "/model")  # the first release in every window
    assert [s.name for s in made.sets] == ["own", "held-out-new", "held-out-earlier"]
    assert made.evaluation.record
    rows = [json.loads(line) for line in (folder.window(2) / "train.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [record_name(i) for i in (*second.train, *second.replayed)]
    earlier = [json.loads(line) for line in (folder.window(2) / "held-out-earlier.jsonl").read_text().splitlines()]
    assert [row["id"] for row in earlier] == [record_name(i) for i in first.held_out[1:]]
    assert earlier[0]["answer"] == "Yes."
    (folder.run(2)).mkdir()
    (folder.run(2) / "config.yaml").touch()  # its run has begun
    assert write_window(folder, state.windows[2], config, state, inbox, model) == written
    with pytest.raises(ConfigurationChanged):
        write_window(folder, state.windows[2], config.model_copy(update={"seed": 7}), state, inbox, model)
