"""Rows of a prepared run as the model will see them: contexts and reply as text, with the loss tokens marked."""

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from sdft.services.base.errors import UserError
from sdft.services.data.contexts import PromptBuilder
from sdft.services.data.demonstrations import Record
from sdft.services.data.pairs import PromptPair
from sdft.services.planning.prepare import prompt_builder
from sdft.services.planning.prepared import Prepared, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "⟦", "⟧"  # around the loss tokens, with colour and without
LOSS, SKIPPED, HEADING = "green", "dim", "bold"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
CUT = "\ufffd"  # what is decoded of the first bytes of a character


def shown_rows(prepared: Prepared, count: int) -> str:
    """Return the first `count` rows of each stage, in colour if standard output is a terminal that shows it."""
    # rich writes bold and dim even if NO_COLOR is set. Without a colour system it writes no codes at all.
    console = Console(color_system=None if os.environ.get("NO_COLOR") else "auto")
    with console.capture() as capture:
        for stage in prepared.stages:
            for line in _stage(prepared, stage, count):
                console.print(line, soft_wrap=True)
    return capture.get()


def _stage(prepared: Prepared, stage: Stage, count: int) -> Iterator[Text]:
    builder = prompt_builder(stage.config, prepared.tokenizer, prepared.path.parent, prepared.begun)
    name = f"{stage.name}: " if stage.name else ""
    rows = list(zip(stage.source.records, stage.prompts, strict=True))
    if not rows:
        yield Text(f"\n── {name}{stage.source.name} has no row yet", HEADING)
    for number, (record, pair) in enumerate(rows[:count], start=1):
        yield Text(f"\n── {name}row {number} of {len(rows)}: {record.where}", HEADING)
        yield from _contexts(stage, prepared.tokenizer, pair)
        yield from _reply(stage, prepared.tokenizer, builder, record, pair)


def _contexts(stage: Stage, tokenizer: "PreTrainedTokenizerBase", pair: PromptPair) -> Iterator[Text]:
    yield Text(f"── student's context, {len(pair.student_ids)} tokens:", HEADING)
    yield Text(_text(tokenizer, pair.student_ids.tolist()))
    if pair.demonstration_ids is not None and not stage.config.method.needs_context:
        yield Text("── teacher's context: none, the demonstration itself is trained", HEADING)
    elif not stage.config.method.teacher_scores:
        yield Text("── teacher's context: none, the method has no teacher", HEADING)
    elif pair.teacher_ids is not None and np.array_equal(pair.teacher_ids, pair.student_ids):
        yield Text("── teacher's context: the same", HEADING)
    elif pair.teacher_ids is not None:
        yield Text(f"── teacher's context, {len(pair.teacher_ids)} tokens:", HEADING)
        yield Text(_text(tokenizer, pair.teacher_ids.tolist()))


def _reply(
    stage: Stage, tokenizer: "PreTrainedTokenizerBase", builder: PromptBuilder, record: Record, pair: PromptPair
) -> Iterator[Text]:
    """Show the demonstration as the reply: it is trained, or it takes the place of what an engine samples later."""
    method = stage.config.method
    if pair.demonstration_ids is not None and not method.needs_context:
        words, ids, skipped = "reply (the demonstration)", pair.demonstration_ids.tolist(), 0
    else:
        skipped = method.skipped
        first = f" but the first {skipped} tokens" if skipped else ""
        sampled = Text(f"── reply: sampled during the run; all{first} in the loss", HEADING)
        if record.demonstration is None or (method.trains_demonstrations and pair.demonstration_ids is None):
            yield sampled
            return
        try:
            ids, _ = builder.conversation(record)
        except UserError as problem:  # a run with this method does not train the demonstration, so it may be no reply
            yield sampled
            yield Text(f"   the demonstration cannot take its place: {problem}", HEADING)
            return
        words = "reply (the demonstration in place of a sampled one)"
    in_loss = max(0, len(ids) - skipped)
    where = f" {OPEN}{CLOSE}" if in_loss else ""
    yield Text(f"── {words}, {len(ids)} tokens, {in_loss} in the loss{where}:", HEADING)
    longest = stage.config.sampling.max_new_tokens
    if len(ids) > longest:
        yield Text(f"   a sampled reply is cut after {longest} tokens, sampling.max_new_tokens", HEADING)
    whole = _text(tokenizer, ids)
    before = _text(tokenizer, ids[:skipped]).rstrip(CUT)
    yield Text.assemble((before, SKIPPED), (f"{OPEN}{whole[len(before) :]}{CLOSE}", LOSS) if in_loss else "")


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Decode tokens, the special ones too. Control characters other than a new line and a tab become escapes."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
