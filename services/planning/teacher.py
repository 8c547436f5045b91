"""An external teacher: another model with the same tokens, which its engines load and keep."""

from pathlib import Path
from typing import TYPE_CHECKING

from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.derived import derived
from sdft.services.planning.examined import examined
from sdft.services.planning.models import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def external_teacher(config: RunConfig, base: Path) -> Path | None:
    """Return the folder of the teacher; None if the teacher's weights are the student's. Raises UserError."""
    teacher = config.teacher_in_use
    if teacher.weights != "external" or teacher.model is None:
        return None
    try:
        folder = derived(resolve_model(teacher.model, base), config.device, config.dtype, trains=False).folder
        with examined(folder, trains=False):
            return folder
    except UserError as error:
        raise UserError(f"teacher.{error}") from None


def check_same_tokens(tokenizer: "PreTrainedTokenizerBase", teacher: Path) -> None:
    """UserError unless the teacher's tokens are the student's: it scores the student's token ids."""
    own, other = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if own == other:
        return
    differing = [token for token in own if own[token] != other.get(token)] or [t for t in other if t not in own]
    first = min(differing, key=lambda token: own.get(token, other.get(token, 0)))
    raise UserError(
        f"teacher.model: the tokens of {teacher} are not those of the student ({len(differing)} differ, the first is "
        f"{first!r}); choose a teacher with the same tokenizer"
    )
