"""SDPO: what the teacher of each sample sees, and how its sequences are scored."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from sdft.actors.shared.drafts import Completion, Draft, Scores
from sdft.actors.shared.types import IntArray, Rollout, SampleId, Support, TeacherScores
from sdft.services.algorithms.base import Episode, Group
from sdft.services.algorithms.sdpo import Rule, Sdpo
from sdft.services.base.errors import PromptTooLong
from sdft.services.config.run import RunConfig
from sdft.services.grading.graders import GRADERS

PROMPT, OWN = np.asarray([1, 2], np.int32), np.asarray([9], np.int32)
LEAST: dict[str, Any] = {"model": "m", "data": {"train": "t.jsonl"}, "training": {"steps": 1}}
HOUSE = {"type": "tests.fakes.environments:Counting"}


class Texts:
    """Contexts: the teacher's prompt is the text that it shows; a reply's text is its tokens."""

    @property
    def row(self) -> dict[str, Any]:
        return {}

    def teacher(self, **columns: Any) -> IntArray:
        shown = columns["demonstration"] if columns["demonstration"] is not None else columns["feedback"]
        if shown == "5555":
            raise PromptTooLong("too long")
        text = shown if isinstance(shown, str) else "/".join(m["content"] for m in shown)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def text(self, ids: IntArray) -> str:
        return "".join(map(str, ids.tolist()))

    def reply(self, ids: IntArray) -> str:
        return self.text(ids)

    def between(self, messages: Any) -> IntArray:
        raise AssertionError


class Engines:
    """Student and teacher. The student gives the replies, the teacher notes what it is shown."""

    def __init__(self, replies: Sequence[str] = ()) -> None:
        self._replies = replies
        self.shown: list[str] = []

    async def complete(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[Completion]:
        return [completion(reply) for reply in self._replies]

    async def tokens(self, completions: Sequence[Completion]) -> list[IntArray]:
        return [c.rollout.completion_ids for c in completions]

    async def rollouts(self, completions: Sequence[Completion]) -> list[Rollout]:
        return [c.rollout for c in completions]

    async def score(
        self, prompts: Sequence[IntArray], completions: Sequence[Completion], support: Support
    ) -> list[Scores]:
        self.shown += [bytes(p.astype(np.uint8)).decode() for p in prompts]
        return [Scores(scores(c.tokens), 0) for c in completions]


def scores(tokens: int) -> TeacherScores:
    return TeacherScores(
        np.zeros((tokens, 1), np.int32), np.zeros((tokens, 1), np.float32), np.zeros(tokens, np.float32), 0
    )


def completion(reply: str) -> Completion:
    ids = np.asarray([int(c) for c in reply], np.int32)
    return Completion.of(Rollout(PROMPT, ids, np.zeros(len(ids), np.float32), ((0, 0, len(ids)),), "stop"))


def group(n: int, **more: Any) -> Group:
    samples = tuple(SampleId(0, 0, 0, i) for i in range(n))
    return Group(1, samples, tuple(range(n)), PROMPT, OWN, None, Texts(), **more)


def made(method: Sdpo, of: Group, engines: Engines) -> dict[int, str]:
    """Return what the teacher saw of each sample that has a sequence, by the sample's number."""
    drafts: list[Draft] = asyncio.run(method.make(of, engines, engines))
    return dict(zip((d.sample.generation for d in drafts), engines.shown, strict=True))


def right(reply: str) -> bool:
    return reply.startswith("7")


def test_each_sees_the_next_one_that_passed_and_never_itself() -> None:
    engines = Engines(["71", "2", "73", "4"])
    assert made(Sdpo(grader="exact"), group(4, grade=right), engines) == {0: "73", 1: "73", 2: "71", 3: "71"}


def test_the_only_one_that_passed_has_no_sibling() -> None:
    engines = Engines(["71", "2", "3"])
    assert made(Sdpo(grader="exact"), group(3, grade=right), engines) == {1: "71", 2: "71"}


@pytest.mark.parametrize(
    ("without", "shown"),
    [("skip", {}), ("demonstration", {0: "\t", 1: "\t"})],  # 9 is the row's own prompt
)
def test_a_group_without_a_success(without: Any, shown: dict[int, str]) -> None:
    method = Sdpo(grader="exact", without_success=without)
    assert made(method, group(2, grade=right), Engines(["1", "2"])) == shown


def test_a_sibling_that_is_too_long_is_left_out() -> None:
    engines = Engines(["5555", "2"])
    assert made(Sdpo(grader="exact"), group(2, grade=lambda reply: reply == "5555"), engines) == {}


def episode(passed: bool, feedback: str, *replies: str) -> Episode:
    parts = [completion(reply) for reply in replies]
    messages = [{"role": "assistant", "content": reply} for reply in replies]
    between = tuple(np.asarray([0], np.int32) for _ in replies[1:])
    ids = tuple(part.rollout.completion_ids for part in parts)
    return Episode((PROMPT, *between), tuple(parts), ids, passed, feedback, messages=tuple(messages))


class Player:
    def __init__(self, *episodes: Episode | None) -> None:
        self._episodes = list(episodes)

    async def play(self, group: Group, student: Any) -> list[Episode | None]:
        return self._episodes


def test_episodes_show_their_conversation_or_the_environments_feedback() -> None:
    passed, failed = episode(True, "", "1", "2"), episode(False, "the lamp is off", "3")
    method = Sdpo(without_success="feedback")
    assert made(method, group(3, player=Player(passed, failed, None)), Engines()) == {1: "1/2"}
    both = group(2, player=Player(failed, replace(failed, feedback="the door is open")))
    assert made(method, both, Engines()) == {0: "the lamp is off", 1: "the door is open"}


def test_an_episode_is_scored_in_one_pass_and_each_turn_has_its_rows() -> None:
    of = group(2, player=Player(episode(True, "", "1"), episode(False, "", "23", "456")))
    (draft,) = asyncio.run(Sdpo().make(of, Engines(), Engines()))
    assert [turn.scores.first for turn in draft.turns if turn.scores is not None] == [0, 3]
    assert [turn.completion.tokens for turn in draft.turns] == [2, 3]
    assert len(draft) == len(PROMPT) + 2 + 1 + 3


def test_its_rules_are_the_graders() -> None:
    assert set(get_args(Rule)) == GRADERS.keys()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"method": "sdpo", "sampling": {"generations": 2}}, "set method.grader, or environment"),
        (
            {"method": {"type": "sdpo", "grader": "exact"}, "sampling": {"generations": 2}, "environment": HOUSE},
            "remove method.grader",
        ),
        ({"method": {"type": "sdpo", "grader": "exact"}}, "sampling.generations 1 leaves method sdpo nothing to learn"),
        (
            {"method": {"type": "sdpo", "grader": "exact", "without_success": "feedback"}},
            "feedback is of an environment; set environment",
        ),
        (
            {"method": {"type": "sdpo", "without_success": "feedback"}, "environment": HOUSE},
            "no template shows feedback; set data.fallback_template: feedback",
        ),
        (
            {
                "method": {"type": "sdpo", "grader": "exact"},
                "data": {"train": "t.jsonl", "template": "none"},
                "sampling": {"generations": 2},
            },
            "data.template none shows none; set data.template: turn or paper",
        ),
        ({"method": "sft", "environment": HOUSE}, "environment: method sft takes single replies; use method sdft"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RunConfig.model_validate(LEAST | {"sampling": {"max_new_tokens": 64}} | given)
