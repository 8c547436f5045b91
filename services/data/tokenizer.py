"""The tokenizer of a model folder, and how many of the model's rows are tokens."""

from pathlib import Path
from typing import TYPE_CHECKING

from sdft.actors.shared.process import large_imports
from sdft.services.base.errors import UserError, first_line
from sdft.services.data.without_torch import import_for_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(model_path: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model folder; nothing is downloaded. UserError if it cannot be loaded."""
    with large_imports(), import_for_tokenizers():
        from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(model_path), local_files_only=True)
    except Exception as e:  # noqa: BLE001 - tokenizers raises plain Exception for bad files
        raise UserError(
            f"model: the tokenizer in {model_path} cannot be loaded ({first_line(e)}); check tokenizer.json and "
            f"tokenizer_config.json there, or download the model again"
        ) from None
    return tokenizer


def vocabulary_of(tokenizer: "PreTrainedTokenizerBase", rows: int | None) -> int:
    """Return the number of rows of the model that are tokens: the tokenizer's largest id and one.

    rows: rows of the model's embedding (None: unknown). UserError if the tokenizer has a token without a row. Tokens
    that stand for an image or a sound may have none: Gemma 3's models for text alone have the tokenizer of the others.
    """
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    ids = {token: i for token, i in tokenizer.get_vocab().items() if token not in placeholders}
    last = max(ids, key=lambda token: ids[token])
    if rows is not None and ids[last] >= rows:
        raise UserError(
            f"model: the tokenizer in {tokenizer.name_or_path} has the token {last} with id {ids[last]}, and the "
            f"model's embedding has rows for tokens 0 to {rows - 1} only; put the tokenizer that belongs to these "
            f"weights into the model's folder"
        )
    return ids[last] + 1
