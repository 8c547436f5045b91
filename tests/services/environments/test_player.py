"""Episodes as tokens: what is between two replies, and that sampled tokens stay as they are."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdft.actors.shared.drafts import Completion
from sdft.actors.shared.types import IntArray, Rollout
from sdft.services.algorithms.base import Episode
from sdft.services.config.environment import EnvironmentConfig
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import Message
from sdft.services.data.record_contexts import RecordContexts
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.environments.player import LENGTH, TOKENS, EpisodePlayer

PROMPT = (Message(role="user", content="Count to two."),)
RECORD = Record("row-1", PROMPT, "Yes.", None, None, None, "train.jsonl:1")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def contexts(tokenizer: Any) -> RecordContexts:
    return RecordContexts(PromptBuilder(tokenizer, "turn", Path("."), None), RECORD, 100)


def in_characters(tokenizer: Any, text: str) -> IntArray:
    """Return tokens of single characters, and the one that ends a reply: not what the tokenizer makes of the text."""
    ids = [i for character in text for i in tokenizer(character, add_special_tokens=False)["input_ids"]]
    return np.asarray([*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")], np.int32)


def played(
    tokenizer: Any, contexts: RecordContexts, replies: Sequence[str], episodes: int = 1, **settings: Any
) -> tuple[list[tuple[Episode | None, str]], list[list[IntArray]]]:
    """Play episodes with these replies. Returns them, and the prompts of each round."""
    prompts: list[list[IntArray]] = []

    async def complete(given: Sequence[IntArray], seeds: Sequence[int]) -> list[tuple[Completion, IntArray]]:
        text = replies[len(prompts)]
        prompts.append(list(given))
        ids = in_characters(tokenizer, text)
        ends = "length" if text.endswith("...") else "stop"
        rollout = Rollout(given[0], ids, np.zeros(len(ids), np.float32), ((3, 0, len(ids)),), ends)
        return [(Completion.of(rollout), ids) for _ in given]

    async def run() -> list[tuple[Episode | None, str]]:
        given = {"type": "tests.fakes.environments:Counting", "settings": {"turns": len(replies)}} | settings
        player = EpisodePlayer(EnvironmentConfig.model_validate(given), 16)
        prompt = np.asarray(contexts.builder.student(contexts.record), np.int32)
        try:
            return await player.play_all([(prompt, i, contexts) for i in range(episodes)], complete)
        finally:
            await player.environments.stop()

    return asyncio.run(run()), prompts


def test_sampled_tokens_are_never_tokenized_again(tokenizer: Any, contexts: RecordContexts) -> None:
    """The next prompt has them as they were, although the tokenizer would make other tokens of their text."""
    ((episode, _),), prompts = played(tokenizer, contexts, ["the number", "yes"])
    assert episode is not None
    sampled = in_characters(tokenizer, "the number")
    assert tokenizer("the number", add_special_tokens=False)["input_ids"] != sampled[:-1].tolist()
    second = prompts[1][0]
    start = len(prompts[0][0])
    assert second[start : start + len(sampled)].tolist() == sampled.tolist()
    assert tokenizer.decode(second[start + len(sampled) :]) == (
        "\n<|im_start|>user\nrow-1 heard the number<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [c.tolist() for c in episode.contexts] == [
        prompts[0][0].tolist(),
        second[start + len(sampled) :].tolist(),
    ]
    assert (episode.passed, episode.feedback) == (True, "row-1 after 2")
    assert episode.behind_the_prompt.tolist() == [*second[start:].tolist(), *in_characters(tokenizer, "yes").tolist()]


def test_the_whole_is_what_the_chat_template_makes_of_the_conversation(
    tokenizer: Any, contexts: RecordContexts
) -> None:
    ((episode, _),), _ = played(tokenizer, contexts, ["one", "yes"])
    assert episode is not None
    conversation = [
        *PROMPT,
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "row-1 heard one"},
        {"role": "assistant", "content": "yes"},
    ]
    whole = np.concatenate([episode.contexts[0], episode.behind_the_prompt])
    assert tokenizer.decode(whole) == tokenizer.apply_chat_template(conversation, tokenize=False).removesuffix("\n")


def test_a_demonstration_of_several_turns_has_the_same_tokens(tokenizer: Any, contexts: RecordContexts) -> None:
    """What is trained of it is what the assistant writes, with the tokens that end its replies."""
    turns = (
        Message(role="assistant", content="one"),
        Message(role="user", content="row-1 heard one"),
        Message(role="assistant", content="yes"),
    )
    record = replace(RECORD, demonstration=turns)
    ids, mask = contexts.builder.conversation(record)
    whole = [*contexts.builder.student(record), *ids]
    assert tokenizer.decode(whole) == tokenizer.apply_chat_template([*PROMPT, *turns], tokenize=False).removesuffix(
        "\n"
    )
    assert mask is not None
    assert tokenizer.decode([i for i, own in zip(ids, mask, strict=True) if own]) == "one<|im_end|>yes<|im_end|>"
    alone = replace(RECORD, demonstration="one")
    assert contexts.builder.conversation(alone) == (contexts.builder.demonstration(alone), None)


def test_episodes_of_one_call_go_on_in_rounds(tokenizer: Any, contexts: RecordContexts) -> None:
    found, prompts = played(tokenizer, contexts, ["one", "two", "yes"], episodes=3)
    assert [len(round_) for round_ in prompts] == [3, 3, 3]
    assert all(episode is not None and len(episode.completions) == 3 for episode, _ in found)


@pytest.mark.parametrize(
    ("replies", "settings", "turns", "feedback"),
    [
        (["one", "two", "yes"], {"max_turns": 2}, 2, "it was not done after 2 replies (environment.max_turns)"),
        (["one", "two", "yes"], {"max_tokens": 30}, 1, TOKENS),
        (["one", "cut..."], {}, 2, LENGTH),
    ],
)
def test_limits_end_an_episode_that_has_not_passed(
    tokenizer: Any, contexts: RecordContexts, replies: list[str], settings: dict[str, Any], turns: int, feedback: str
) -> None:
    ((episode, _),), _ = played(tokenizer, contexts, replies, **settings)
    assert episode is not None
    assert (len(episode.completions), episode.passed, episode.cut, episode.feedback) == (turns, False, feedback, "")


def test_a_lost_episode_has_a_reason(tokenizer: Any, contexts: RecordContexts) -> None:
    ((episode, reason),), _ = played(tokenizer, contexts, ["exit", "yes"])
    assert episode is None
    assert reason == "environment: the environment's process ended with exit code 3"


def test_what_the_chat_template_does_not_show_is_refused(tokenizer: Any) -> None:
    """A template that leaves out the tool's messages."""
    other = load_tokenizer(Path(tokenizer.name_or_path))
    other.chat_template = TOOLLESS
    builder = PromptBuilder(other, "turn", Path("."), None)
    assert builder.between(RECORD, [{"role": "user", "content": "shown"}])
    with pytest.raises(Exception, match="does not show what answers a reply unchanged"):
        builder.between(RECORD, [{"role": "tool", "content": "left out"}])


TOOLLESS = (
    "{% for m in messages if m['role'] != 'tool' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
