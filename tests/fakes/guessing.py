"""Two environments of the library `verifiers`: one answers guesses, the other one has a tool.

Imported by an interpreter that has the library.
"""

from typing import Any

import verifiers as vf
from datasets import Dataset


def said(message: Any) -> str:
    """Return the text of a message, which is an object or a dictionary."""
    return str(message["content"] if isinstance(message, dict) else message.content)


class Guess(vf.MultiTurnEnv):
    """Is solved by the row's answer. The reply `rewrite` makes it change what was said before."""

    async def get_prompt_messages(self, state: Any) -> Any:
        messages = await super().get_prompt_messages(state)
        if len(messages) > 2 and said(messages[1]) == "rewrite":
            return [{"role": "user", "content": "Forget all that."}, *messages[1:]]
        return messages

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        guess = said(messages[-1])
        if guess == "crash":
            raise vf.Error("the game is broken")
        return [{"role": "user", "content": "warm" if guess == "6" else "cold"}]

    @vf.stop
    async def found(self, state: Any) -> bool:
        return bool(state["trajectory"]) and said(state["trajectory"][-1]["completion"][-1]) == state["answer"]


def reward(completion: Any, answer: str, **_: Any) -> float:
    return 1.0 if answer in said(completion[-1]) else 0.25


def double(number: int) -> int:
    """Double a number."""
    return 2 * number


def load_environment(tools: bool = False) -> Any:
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "Guess."}], "answer": "5"}])
    given = {"dataset": rows, "rubric": vf.Rubric(funcs=[reward]), "max_turns": 3}
    return vf.ToolEnv(tools=[double], **given) if tools else Guess(**given)
