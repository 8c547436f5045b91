"""The tokenizer of a model folder."""

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
