"""The state of a service: what decisions add up to, and where each record is."""

from sdft.services.releases.events import (
    Candidate,
    Ended,
    Event,
    Held,
    Opened,
    Refused,
    Released,
    Served,
    event_of,
    line_of,
)
from sdft.services.releases.state import ServiceState

BEGIN: list[Event] = [Candidate(1, None, "/model", {}, 0, {}, 0.0), Served(1, "start", 0.0)]
WINDOW = Opened(1, 1, [0, 1, 2], [3], [], 1.0)
MADE = Candidate(2, 1, "releases/0002", {"a": "b"}, 9, {"2": "truncated"}, 2.0)


def state(*events: Event) -> ServiceState:
    """Apply events as they come back from a file."""
    made = ServiceState()
    for event in (*BEGIN, *events):
        made.apply(event_of(line_of(event)))
    return made


def states(of: ServiceState, deleted: set[int] | None = None) -> list[str]:
    return [of.record(i, i in (deleted or set())).state for i in range(5)]


def test_the_life_of_records() -> None:
    assert states(state()) == ["waiting"] * 5
    assert states(state(WINDOW)) == ["in window"] * 4 + ["waiting"]
    after = ["trained", "trained", "dropped", "held out", "waiting"]
    assert states(state(WINDOW, MADE)) == after
    served = state(WINDOW, MADE, Served(2, "gate", 3.0))
    assert states(served) == after
    assert served.record(2, False).reason == "truncated"
    assert served.record(0, False).release == 2
    assert (served.served, served.releases[1].status) == (2, "earlier")


def test_deleted_records() -> None:
    assert states(state(), {1})[1] == "deleted"
    assert states(state(WINDOW, MADE), {1})[1] == "trained"  # it was trained before it was deleted
    assert state(WINDOW, MADE).in_releases(1) == [2]
    assert state().in_releases(1) == []


def test_a_refused_release_quarantines_its_records() -> None:
    refused = state(WINDOW, MADE, Refused(2, "gate", "worse", [], 3.0))
    assert states(refused) == ["quarantined", "quarantined", "dropped", "quarantined", "waiting"]
    assert refused.record(0, False).reason == "worse"
    assert refused.undecided is None
    assert states(state(WINDOW, MADE, Refused(2, "gate", "worse", [], 3.0), Released([0, 3], 4.0)))[:4] == [
        "waiting",
        "quarantined",
        "dropped",
        "waiting",
    ]


def test_a_rollback_withdraws_releases() -> None:
    rolled = state(WINDOW, MADE, Served(2, "gate", 3.0), Served(1, "operator", 4.0))
    assert (rolled.served, rolled.releases[2].status) == (1, "withdrawn")
    assert states(rolled)[0] == "quarantined"
    again = state(WINDOW, MADE, Served(2, "gate", 3.0), Served(1, "o", 4.0), Served(2, "o", 5.0))
    assert states(again)[0] == "trained"


def test_a_window_without_a_candidate() -> None:
    assert states(state(WINDOW, Ended(1, True, "rolled back", 2.0))) == ["waiting"] * 5
    failed = state(WINDOW, Ended(1, False, "bad data", 2.0))
    assert states(failed)[:4] == ["quarantined"] * 4
    assert failed.open_window is None


def test_a_held_candidate_is_undecided() -> None:
    held = state(WINDOW, MADE, Held(2, "gate", "few questions", 3.0))
    assert held.undecided is not None
    assert held.undecided.number == 2
    assert states(held)[0] == "trained"


def test_parts_of_a_refused_window() -> None:
    events: list[Event] = [WINDOW, MADE, Refused(2, "gate", "worse", [[0, 1], [3]], 3.0)]
    split = state(*events)
    assert split.parts == [[0, 1], [3]]
    assert states(split) == ["waiting", "waiting", "dropped", "waiting", "waiting"]
    opened = state(*events, Opened(2, 1, [0, 1], [], [], 5.0))
    assert opened.parts == [[3]]


def test_a_refused_release_that_a_person_promotes_has_its_records() -> None:
    """Its records were let out to be tried again: they are trained in the release, and are not trained twice."""
    promoted = state(WINDOW, MADE, Refused(2, "gate", "worse", [[0, 1], [3]], 3.0), Served(2, "operator", 4.0))
    assert states(promoted)[:4] == ["trained", "trained", "dropped", "held out"]
    retried = state(
        WINDOW,
        MADE,
        Served(2, "gate", 3.0),
        Served(1, "operator", 4.0),
        Released([0, 1, 3], 5.0),
        Served(2, "operator", 6.0),
    )
    assert states(retried)[:4] == ["trained", "trained", "dropped", "held out"]


def test_what_began_from_another_release_ends() -> None:
    """A window and a candidate of release 2 end when release 1 is served again; their records wait."""
    served: list[Event] = [WINDOW, MADE, Served(2, "gate", 3.0)]
    second = Opened(2, 2, [4], [], [0], 4.0)
    window = state(*served, second, Served(1, "operator", 5.0))
    assert window.open_window is None
    assert states(window)[4] == "waiting"
    candidate = state(
        *served, second, Candidate(3, 2, "x", {}, 2, {}, 5.0), Held(3, "gate", "x", 6.0), Served(1, "o", 7.0)
    )
    assert (candidate.undecided, candidate.releases[3].status) == (None, "refused")
    assert states(candidate)[4] == "waiting"
    assert states(candidate)[0] == "quarantined"


def test_a_release_of_another_line_withdraws_this_one() -> None:
    other: list[Event] = [Opened(2, 1, [4], [], [], 5.0), Candidate(3, 2, "x", {}, 1, {}, 6.0)]
    both = state(
        WINDOW, MADE, Served(2, "gate", 3.0), Served(1, "o", 4.0), *other, Served(3, "gate", 7.0), Served(2, "o", 8.0)
    )
    assert [both.releases[n].status for n in (1, 2, 3)] == ["earlier", "served", "withdrawn"]
    assert (states(both)[0], states(both)[4]) == ("trained", "quarantined")
    assert both.lineage == (2, 1)


def test_replayed_records_are_in_later_releases() -> None:
    later = state(
        WINDOW,
        MADE,
        Served(2, "gate", 3.0),
        Opened(2, 2, [4], [], [0], 4.0),
        Candidate(3, 2, "x", {}, 2, {}, 5.0),
        Served(3, "gate", 6.0),
    )
    assert later.in_releases(0) == [2, 3]
    assert later.in_releases(4) == [3]
    assert later.lineage == (3, 2, 1)
