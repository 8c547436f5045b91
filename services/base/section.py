"""The base class of the configuration's sections, and the short form of a section that is one of several kinds."""

from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration. Unknown keys are errors; values cannot be changed after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def short_form(default: str) -> Callable[[Any], Any]:
    """Return a validator that completes a section with a `type`: `sft` is {type: sft}; without one it is `default`."""

    def complete(value: Any) -> Any:
        if isinstance(value, str):
            return {"type": value}
        return {"type": default} | value if isinstance(value, dict) else value

    return complete
