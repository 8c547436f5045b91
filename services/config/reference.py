"""docs/configuration.md, made from the descriptions of the settings.

python -m sdft.services.config.reference > docs/configuration.md
"""

import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sdft.services.algorithms.base import Algorithm
from sdft.services.config.explain import further, models_of, tag_of
from sdft.services.config.run import RunConfig

HEAD = """# Configuration

A configuration is a YAML file. An unknown key, a value of another type and a combination without a meaning are errors,
which name the key and the fix. `sdft train CONFIG --dry-run` prints every setting with its value, and
`--set training.steps=100` replaces one. Paths are relative to the configuration's file.

This page is made from the program: `python -m sdft.services.config.reference`.
"""
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", Any: "any value"}
_SIGNS = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}


def sections() -> dict[type[BaseModel], str]:
    """Return every section's model and place, as `learner.optimizer`. One that stages have too has the run's place."""
    places: dict[type[BaseModel], str] = {RunConfig: ""}
    waiting: list[type[BaseModel]] = [RunConfig]
    for model in waiting:
        # Breadth first, and stages last: what a stage may replace is described where the run has it.
        for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] == "stages"):
            for section in (kinds := _kinds(field)):
                if section not in places:
                    place = f"{places[model].split(' ')[0]}.{name}".lstrip(".")
                    kind = f" {tag_of(section)}" if len(kinds) > 1 else ""
                    places[section] = f"{place}{'[]' if _is_list(field.annotation) else ''}{kind}"
                    waiting.append(section)
    order = list(RunConfig.model_fields)
    return dict(
        sorted(
            places.items(),
            key=lambda item: (order.index(re.split(r"[. \[]", item[1])[0]) if item[1] else -1, item[1].split(" ")[0]),
        )
    )


def page() -> str:
    """Return the whole page."""
    places = sections()
    parts = [HEAD]
    for model, place in places.items():
        title = f"`{place}`" if place else "The file"
        rows = ["| setting | value | default | |", "|---|---|---|---|"]
        rows += [_row(name, field, places) for name, field in model.model_fields.items()]
        rows += [f"| a name of your own | {_link(places[entry])} |  | A further one |" for entry in further([model])]
        about = " ".join((model.__doc__ or "").split())
        parts.append(f"## {title}\n\n{about}\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _row(name: str, field: FieldInfo, places: dict[type[BaseModel], str]) -> str:
    kinds = _kinds(field)
    if kinds:
        value = ", ".join(_link(places[kind]) for kind in kinds)
    else:
        limits = [
            f"{_SIGNS[type(m)]} {getattr(m, type(m).__name__.lower())}" for m in field.metadata if type(m) in _SIGNS
        ]
        value = ", ".join([_type(field.annotation), *limits])
    return f"| `{name}` | {value} | {_default(field)} | {_escaped(field.description or '')} |"


def _link(place: str) -> str:
    return f"[`{place}`](#{place.replace('.', '').replace('[]', '').replace(' ', '-')})"


def _kinds(field: FieldInfo) -> list[type[BaseModel]]:
    """Return the section classes of a setting, without the base class of a user's own."""
    return [model for model in models_of(field.annotation) if model is not Algorithm]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _is_list(annotation: Any) -> bool:
    return any(get_origin(a) is tuple for a in (annotation, *get_args(annotation)))


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in inner if a is not type(None))
    if origin is tuple:
        return "list of " + _type(inner[0])
    if origin is dict:
        return f"mapping to {_type(inner[1])}"
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None or field.default is PydanticUndefined:
        return "`auto`"
    if isinstance(field.default, BaseModel):
        return f"`{tag_of(field.default.__class__)}`" if len(_kinds(field)) > 1 else ""
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


if __name__ == "__main__":
    print(page(), end="")
