"""The algorithms by name, and the type of the setting `method`: one of them, or a user's own by import path."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, SerializeAsAny, Tag, ValidationError

from sdft.actors.shared.own_code import is_own, own_class
from sdft.services.algorithms.base import Algorithm
from sdft.services.algorithms.dft import Dft
from sdft.services.algorithms.hindsight import Hindsight
from sdft.services.algorithms.mix import Mix
from sdft.services.algorithms.off_policy import OffPolicy
from sdft.services.algorithms.recall import Recall
from sdft.services.algorithms.sdft import Sdft
from sdft.services.algorithms.sdpo import Sdpo
from sdft.services.algorithms.sft import Sft
from sdft.services.base.section import short_form

ALGORITHMS: dict[str, type[Algorithm]] = {
    "sdft": Sdft,
    "off_policy": OffPolicy,
    "sft": Sft,
    "dft": Dft,
    "recall": Recall,
    "sdpo": Sdpo,
    "hindsight": Hindsight,
    "mix": Mix,
}
OWN = "own"  # tag of an algorithm that is not built in


def _tag(value: Any) -> str | None:
    name = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return OWN if isinstance(name, str) and is_own(name) else name


def _own(value: Any) -> Any:
    """Make a user's own algorithm from its settings. Raises ValueError if it is none, or a setting is wrong."""
    if not isinstance(value, dict):
        return value
    try:
        return own_class(value["type"], Algorithm).model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("method", *first["loc"]))
        raise ValueError(f"{key}: {first['msg']}") from None


Method = Annotated[
    Annotated[Sdft, Tag("sdft")]
    | Annotated[OffPolicy, Tag("off_policy")]
    | Annotated[Sft, Tag("sft")]
    | Annotated[Dft, Tag("dft")]
    | Annotated[Recall, Tag("recall")]
    | Annotated[Sdpo, Tag("sdpo")]
    | Annotated[Hindsight, Tag("hindsight")]
    | Annotated[Mix, Tag("mix")]
    | Annotated[SerializeAsAny[Algorithm], BeforeValidator(_own), Tag(OWN)],
    Discriminator(_tag),
    BeforeValidator(short_form("sdft")),
]
