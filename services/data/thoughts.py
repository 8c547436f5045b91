"""The reasoning that a model writes before its answer, between marks such as <think> and </think>."""

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Used by Qwen, DeepSeek and most others; by Magistral; by Seed-OSS; by Command A.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
)
LAST = 16  # tokens at the end of a prompt that are decoded to find a mark


def without_thoughts(text: str) -> str:
    """Remove the reasoning from a reply; the rest is the answer.

    If the prompt began the reasoning, the reply has only the end mark, and the text before it is removed. Reasoning
    without an end mark leaves an empty answer.
    """
    for begin, end in MARKS:
        if begin not in text and end not in text:
            continue
        text = re.sub(f"{re.escape(begin)}.*?{re.escape(end)}", "", text, flags=re.DOTALL).rpartition(end)[2]
        if begin in text:
            return ""
    return text


def parts(text: str) -> list[str]:
    """Split a reply at the marks of its reasoning: the reasoning and the answer, without white space around them."""
    marks = "|".join(re.escape(mark) for pair in MARKS for mark in pair)
    return [part.strip() for part in re.split(marks, text) if part.strip()]


def opened_by(tokenizer: "PreTrainedTokenizerBase", prompt_ids: list[int]) -> str:
    """Return the begin mark of reasoning that some chat templates write at the end of a prompt, or ""."""
    prompt = str(tokenizer.decode(prompt_ids[-LAST:], skip_special_tokens=False)).rstrip()
    return next((mark for mark, _ in MARKS if prompt.endswith(mark)), "")


class ReplyText:
    """Decode replies to text: without special tokens, but with all marks of the reasoning."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _special(self) -> dict[int, str]:
        """Marks that are special tokens, by token id; decoding would drop them."""
        marks = {mark for pair in MARKS for mark in pair}
        added = self._tokenizer.added_tokens_decoder.items()
        return {i: token.content for i, token in added if token.special and token.content in marks}

    def __call__(self, prompt_ids: list[int], reply_ids: list[int]) -> str:
        """Return the text of a reply. A begin mark at the end of the prompt (some chat templates) is prepended."""
        parts, begin = [], 0
        for i, token in enumerate(reply_ids):
            if token in self._special:
                parts += [self._decoded(reply_ids[begin:i]), self._special[token]]
                begin = i + 1
        parts.append(self._decoded(reply_ids[begin:]))
        return "".join([opened_by(self._tokenizer, prompt_ids), *parts])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
