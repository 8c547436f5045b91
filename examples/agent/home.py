"""A home with devices and a calendar, as an environment: the student calls tools until the home is as it should be.

    look(Budget)          ─►  Result: Budget is at 14:30 in the office.
    setLight(office, 40)  ─►  Result: Light set.
    Done.                 ─►  the end: passed if every device is in the wanted state

A reply is one call and nothing else. The first reply that is no call ends the episode. The answer of a row says where
people and events are, and which devices must have changed at the end, from START to what:

    {"events": {title: [time, room]}, "people": {name: room}, "wanted": {device: value}}
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sdft.services.environments.base import Answer, Done, Environment

ROOMS = ("kitchen", "bedroom", "garage", "hallway", "attic", "office", "bathroom", "basement", "nursery", "library")
START: dict[str, str | int] = {"alarm": ""}
for _room in ROOMS:
    START |= {f"{_room} light": 0, f"{_room} heating": 15, f"{_room} song": ""}
_CALL = re.compile(r"\s*(\w+)\(([^()]*)\)\s*")
_TIME = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


class Wrong(Exception):
    """A call that the home refuses. The message is what the student sees."""


class Home(Environment):
    """One request of a user."""

    async def reset(self, record: Mapping[str, Any]) -> None:
        """Put people and events where the row's answer has them. ValueError for a device that the home lacks."""
        answer = record["answer"]
        self._events: dict[str, list[str]] = answer["events"]
        self._people: dict[str, str] = answer["people"]
        self._state = dict(START)
        self._wanted = START | answer["wanted"]
        if unknown := self._wanted.keys() - START.keys():
            raise ValueError(f"the home has no {', '.join(sorted(unknown))}")

    async def step(self, reply: str) -> Answer | Done:
        """Make the call of a reply; without one compare the devices with the wanted state."""
        call = _CALL.fullmatch(reply)
        if call is None:
            return self._graded()
        name, arguments = call[1], [argument.strip() for argument in call[2].split(",") if argument.strip()]
        try:
            if name not in TOOLS:
                raise Wrong(f"There is no tool {name}.")
            parameters, tool = TOOLS[name]
            if len(arguments) != len(parameters):
                raise Wrong(f"Call {name}({', '.join(parameters)}).")
            return f"Result: {tool(self, *arguments)}"
        except Wrong as wrong:
            return f"Result: {wrong}"

    def _graded(self) -> Done:
        wrong = [
            f"{device} is {self._state[device] or 'off'}, not {value or 'off'}"
            for device, value in self._wanted.items()
            if self._state[device] != value
        ]
        return Done(passed=not wrong, feedback="; ".join(wrong))

    def _look(self, name: str) -> str:
        if name in self._people:
            return f"{name} is in the {self._people[name]}."
        if name not in self._events:
            raise Wrong(f"There is no person or event {name}.")
        time, room = self._events[name]
        return f"{name} is at {time} in the {room}."

    def _set_alarm(self, time: str) -> str:
        if _TIME.fullmatch(time) is None:
            raise Wrong(f"{time} is no time.")
        self._state["alarm"] = time
        return "Alarm set."

    def _set_light(self, room: str, percent: str) -> str:
        device = _device(room, "light")
        self._state[device] = _number(percent, 0, 100)
        return "Light set."

    def _set_heating(self, room: str, degrees: str) -> str:
        device = _device(room, "heating")
        self._state[device] = _number(degrees, 5, 30)
        return "Heating set."

    def _play_song(self, room: str, title: str) -> str:
        self._state[_device(room, "song")] = title
        return "Song on."


# Each tool's parameters, and what it does.
TOOLS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "look": (("name",), Home._look),
    "setAlarm": (("time",), Home._set_alarm),
    "setLight": (("room", "percent"), Home._set_light),
    "setHeating": (("room", "degrees"), Home._set_heating),
    "playSong": (("room", "title"), Home._play_song),
}
SYSTEM = """You control a home with these tools:
look(name): the room of a person, or the time and room of an event
setAlarm(time)
setLight(room, percent)
setHeating(room, degrees)
playSong(room, title)
Reply with one call. After the last call reply Done."""


def _device(room: str, device: str) -> str:
    if room not in ROOMS:
        raise Wrong(f"There is no room {room}.")
    return f"{room} {device}"


def _number(text: str, least: int, largest: int) -> int:
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= largest:
        raise Wrong(f"{text} is no number from {least} to {largest}.")
    return int(text)
