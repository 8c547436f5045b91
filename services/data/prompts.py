"""Build and check the prompts of many records: too long ones and tokens that the model lacks are errors."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.first_token import begins_twice
from sdft.services.data.pairs import PromptPair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_REPORTED = 20


def build_prompts(
    builder: PromptBuilder,
    items: Sequence[Record],
    max_prompt_tokens: int,
    max_teacher_prompt_tokens: int,
    max_demonstration_tokens: int | None = None,
) -> list[PromptPair]:
    """Build the prompts of all items in order. Nothing is truncated: UserError lists the items that are too long.

    max_demonstration_tokens: None leaves demonstration_ids empty (None).
    """
    pairs: list[PromptPair] = []
    too_long: list[str] = []
    needed: dict[str, int] = {}
    for item in items:
        teacher_ids = builder.teacher(item)
        student_ids = builder.student(item)
        reply_ids, mask = (None, None) if max_demonstration_tokens is None else builder.conversation(item)
        pairs.append(PromptPair.of(student_ids, teacher_ids, reply_ids, mask, item.teacher or ""))
        for part, ids, key, limit in (
            ("prompt", student_ids, "data.max_prompt_tokens", max_prompt_tokens),
            ("teacher's prompt", teacher_ids or [], "data.max_teacher_prompt_tokens", max_teacher_prompt_tokens),
            ("demonstration", reply_ids or [], "sampling.max_new_tokens", max_demonstration_tokens or 0),
        ):
            if len(ids) > limit:
                too_long.append(f"{item.where}: the {part} has {len(ids)} tokens, but {key} is {limit}")
                needed[key] = max(len(ids), needed.get(key, 0))
    if too_long:
        if len(too_long) > MAX_REPORTED:
            too_long[MAX_REPORTED:] = [f"… and {len(too_long) - MAX_REPORTED} more"]
        mend = " and ".join(f"raise {key} to at least {tokens}" for key, tokens in needed.items())
        raise UserError("\n".join([*too_long, f"{mend}, or shorten these rows"]))
    return pairs


def check_ids(items: Sequence[Record], pairs: Sequence[PromptPair], rows: int | None) -> None:
    """UserError if a token id of a prompt or reply is not below `rows`, the model's embedding rows (None: unknown)."""
    if rows is None:
        return
    for item, pair in zip(items, pairs, strict=True):
        largest = max(int(ids.max(initial=0)) for ids in pair.parts if ids is not None)
        if largest >= rows:
            raise UserError(
                f"{item.where}: the tokenizer gives token {largest}, and the model's embedding has rows for tokens 0 "
                f"to {rows - 1} only; put the tokenizer that belongs to these weights into the model's folder"
            )


def text_prompts(tokenizer: "PreTrainedTokenizerBase", items: Sequence[Record], limit: int) -> list[PromptPair]:
    """Tokenize each text as it is, without a chat template. UserError unless it has 2 to `limit` tokens."""
    pairs = []
    for item in items:
        ids: list[int] = tokenizer(item.text).input_ids
        if not 2 <= len(ids) <= limit:
            raise UserError(
                f"{item.where}: the text has {len(ids)} tokens, and a text must have 2 to {limit} "
                f"(data.max_teacher_prompt_tokens); split the text, or join it with another"
            )
        if begins_twice(tokenizer, ids):
            raise UserError(
                f"{item.where}: the text begins with {tokenizer.bos_token}, and the tokenizer adds another one; remove "
                f"it from the text"
            )
        pairs.append(PromptPair.of(ids, None))
    return pairs
