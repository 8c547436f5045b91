"""The beginning-of-sequence token: a prompt has it exactly once, if the model knows one.

A prompt is tokenized as transformers' apply_chat_template does: the chat template writes the token, and the tokenizer
adds none. A template that leaves it out is not corrected, because most models without it were trained so.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdft.services.base.files import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begins_twice(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> bool:
    """Return whether a sequence begins with two beginning-of-sequence tokens."""
    first = tokenizer.bos_token_id
    return first is not None and list(ids[:2]) == [first, first]


def missing_first(tokenizer: "PreTrainedTokenizerBase", prompt: Sequence[int]) -> str | None:
    """Return the tokens that the tokenizer puts before a text, if this prompt does not begin with them."""
    added = _added_before(tokenizer)
    if not added or list(prompt[: len(added)]) == added:
        return None
    return "".join(map(str, tokenizer.convert_ids_to_tokens(added)))


def _added_before(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    text = "a"
    whole = list(tokenizer(text)["input_ids"])
    bare = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for i in range(len(whole) - len(bare) + 1):
        if i and whole[i : i + len(bare)] == bare:
            return whole[:i]
    # Some versions of transformers ignore add_bos_token if there is a tokenizer.json; the model expects the token.
    path = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    if tokenizer.bos_token_id is not None and path.is_file() and json.loads(read_text(path)).get("add_bos_token"):
        return [int(tokenizer.bos_token_id)]
    return []
