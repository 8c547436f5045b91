"""The reasoning that a model writes before its answer, between marks such as <think> and </think>."""

import re

# Of Qwen, DeepSeek and most others, Magistral, Seed-OSS, Command A. A reply has at most one kind of them.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)


def without_thoughts(text: str) -> str:
    """A reply without its reasoning: what is left is the answer.

    A reasoning that was begun in the prompt has its last mark only: all before that goes. One that does not end leaves
    no answer: "".
    """
    for begin, end in MARKS:
        if begin not in text and end not in text:
            continue
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL).rpartition(end)[2]
        if begin in text:
            return ""
    return text
