"""The events of a run for display: what the retention guard found, and the refreshes of a gated teacher."""

from collections.abc import Sequence

from sdft.services.records.rows import Event

WHAT = {
    "fell": "a guarded set fell",
    "drifted": "a figure drifted",
    "refreshed": "the teacher was refreshed",
    "refused": "a refresh of the teacher was refused",
}
SHOWN = 5  # refreshes that a line of `sdft status` names


def event_lines(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Return the lines of `sdft status`: label and text."""
    lines = []
    found = [event for event in events if event.kind in ("fell", "drifted")]
    if found:
        lines.append(("guard", f"{_times(len(found))}; the last time after step {found[-1].step}: {found[-1].text}"))
    refreshed = [event.step for event in events if event.kind == "refreshed"]
    refused = [event for event in events if event.kind == "refused"]
    if refreshed:
        steps = ", ".join(map(str, refreshed[-SHOWN:]))
        earlier = "..., " if len(refreshed) > SHOWN else ""
        lines.append(("teacher", f"refreshed {_times(len(refreshed))}, after step {earlier}{steps}"))
    if refused:
        last = f"{_times(len(refused))}; the last time after step {refused[-1].step}: {refused[-1].text}"
        lines.append(("" if refreshed else "teacher", f"a refresh was refused {last}"))
    return lines


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
