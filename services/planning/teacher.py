"""External teachers: other models with the same tokens, which their engines load and keep."""

from pathlib import Path
from typing import TYPE_CHECKING

from sdft.actors.roles import teacher_pool
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig
from sdft.services.data.tokenizer import load_tokenizer
from sdft.services.planning.derived import derived
from sdft.services.planning.examined import examined
from sdft.services.planning.models import resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def external_teachers(config: RunConfig, base: Path) -> dict[str, Path]:
    """Return the folders of the teachers by the names of their pools; none if the teacher's weights are the student's.

    Raises UserError.
    """
    teacher = config.teacher_in_use
    models = teacher.models or ({} if teacher.model is None else {"": teacher.model})
    return {teacher_pool(route): _folder(model, route, config, base) for route, model in models.items()}


def _folder(model: str, route: str, config: RunConfig, base: Path) -> Path:
    try:
        folder = derived(resolve_model(model, base), config.device, config.dtype, trains=False).folder
        with examined(folder, trains=False):
            return folder
    except UserError as error:
        raise UserError(f"{_key(route)}: {str(error).removeprefix('model: ')}") from None


def _key(route: str) -> str:
    return f"teacher.models.{route}" if route else "teacher.model"


def check_same_tokens(tokenizer: "PreTrainedTokenizerBase", pool: str, teacher: Path) -> None:
    """UserError unless the teacher's tokens are the student's: it scores the student's token ids.

    pool: the name of its pool. teacher: its folder.
    """
    own, other = tokenizer.get_vocab(), load_tokenizer(teacher).get_vocab()
    if own == other:
        return
    differing = [token for token in own if own[token] != other.get(token)] or [t for t in other if t not in own]
    first = min(differing, key=lambda token: own.get(token, other.get(token, 0)))
    route = pool.removeprefix(teacher_pool("")).removeprefix("-")
    raise UserError(
        f"{_key(route)}: the tokens of {teacher} are not those of the student "
        f"({len(differing)} differ, the first is {first!r}); choose a teacher with the same tokenizer"
    )
