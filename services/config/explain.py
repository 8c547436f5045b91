"""pydantic's errors as sentences: the key, what is wrong with its value, and the fix."""

import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdft.services.config.run import RunConfig

Loc = tuple[str | int, ...]
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping of settings",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
# Removed settings, and what to set instead.
_REPLACED: dict[Loc, str] = {
    ("evaluation", "timeout_s"): (
        "set actors.batch_timeout_s for rollouts, scores and replies, and evaluation.grading_timeout_s for a judge and "
        "lm-eval"
    ),
}


class Problem(NamedTuple):
    """One mistake: its place, and the rest of the sentence after `source: dotted.key`."""

    loc: Loc
    text: str


def explain(error: ValidationError) -> list[Problem]:
    """Return the problems, unknown keys first.

    A mistyped key often causes a missing one. The missing key that an unknown one was meant for is left out.
    """
    errors = error.errors(include_url=False)
    problems, meant = [], set()
    for e in errors:
        if e["type"] == "extra_forbidden":
            parent, key = e["loc"][:-1], str(e["loc"][-1])
            text, suggestion = _unknown(parent, key)
            problems.append(Problem(e["loc"], text))
            meant.add(suggestion)
    for e in errors:
        if e["type"] == "model_type" and _is_further(e["loc"]):  # a value, so it is meant as a setting
            problems.append(Problem(e["loc"], _unknown(e["loc"][:-1], str(e["loc"][-1]))[0]))
        elif e["loc"][-1:] == ("[key]",):
            problems.append(Problem(e["loc"][:-1], _no_column(e["loc"][:-1])))
        elif e["type"] != "extra_forbidden" and not (e["type"] == "missing" and e["loc"] in meant):
            problems.append(Problem(e["loc"], _sentence(e["type"], e["loc"], e["input"], e.get("ctx", {}), e["msg"])))
    return problems


def _unknown(parent: Loc, key: str) -> tuple[str, Loc | None]:
    """Return the message for an unknown key, and the place of the setting that was probably meant."""
    if (*parent, key) in _REPLACED:
        return f"is not a setting any more; {_REPLACED[*parent, key]}", None
    names = list(_fields(parent))
    # Settings of a stage are suggested only for keys inside `stages`. Elsewhere the run's own settings are.
    settings = [loc for loc in all_settings(RunConfig, ()) if loc[0] != "stages" or parent[:1] == ("stages",)]
    elsewhere = [loc for loc in settings if loc[-1] == key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.8 if elsewhere else 0.6)
    if near:
        loc = (*parent, near[0])
        return f"is not a setting; did you mean {dotted(loc)}?", loc
    if elsewhere:
        return f"is not a setting; did you mean {' or '.join(map(dotted, elsewhere))}?", None
    return f"is not a setting; {dotted(parent) or 'the file'} has {', '.join(names)}", None


def _no_column(loc: Loc) -> str:
    """Return the message for an unknown name in `columns`, the only mapping whose keys are fixed."""
    columns = _choices(loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), columns, n=1)
    if near:
        return f"is not a column; did you mean {dotted((*loc[:-1], near[0]))}?"
    return f"is not a column; the columns are {', '.join(columns)}"


def _sentence(error_type: str, loc: Loc, given: Any, ctx: dict[str, Any], message: str) -> str:
    if error_type == "missing":
        if isinstance(loc[-1], int):
            return "is missing from the list"
        description = _fields(loc[:-1])[str(loc[-1])].description
        return "is required but missing" + (
            f"; it is: {description[0].lower()}{description[1:]}" if description else ""
        )
    if error_type == "value_error":
        return f": {ctx['error']}" if loc else str(ctx["error"])
    if error_type in _EXPECTED:
        mend = "; put it in quotes" if error_type == "string_type" and isinstance(given, int | float) else ""
        if error_type == "model_type" and given is None:
            mend = "; give its settings or remove the key"
        return f"must be {_EXPECTED[error_type]}, not {given_text(given)}{mend}"
    if error_type in _LIMITS:
        name, words = _LIMITS[error_type]
        return f"must be {words} {ctx[name]:g}, not {given_text(given)}"
    if error_type == "literal_error":
        options = [str(o) for o in _choices(loc)]
        near = difflib.get_close_matches(str(given), options, n=1) if isinstance(given, str) else []
        mend = f"; did you mean {near[0]}?" if near else ""
        return f"must be {' or '.join(options)}, not {given_text(given)}{mend}"
    if error_type == "string_pattern_mismatch":
        return f"must match the pattern {ctx['pattern']}, and {given_text(given)} does not"
    if error_type == "too_long":
        return f"must have {ctx['max_length']} items, not {ctx['actual_length']}"
    return f"is not valid: {message[0].lower()}{message[1:]} (given: {given_text(given)})"


def loose_values(value: Any, loc: Loc) -> Iterator[Problem]:
    """Yield the problems that strict validation misses: true for a 1 among fixed choices, and non-finite numbers."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from loose_values(inner, (*loc, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from loose_values(inner, (*loc, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(loc, f"must be a finite number, not {value}")
    elif isinstance(value, bool) and isinstance(loc[-1], str) and loc[-1] in _fields(loc[:-1]):
        options = _choices(loc)
        if options and all(type(o) is int for o in options):
            yield Problem(loc, f"must be {' or '.join(map(str, options))}, not {given_text(value)}")


def _fields(section: Loc) -> dict[str, FieldInfo]:
    """Return the settings of the section at `section`; empty if there is no such section."""
    model: type[BaseModel] = RunConfig
    for part in section:
        if isinstance(part, int):
            continue  # an item of a list of sections has the list's model
        inner = model_of(model.model_fields[part].annotation) if part in model.model_fields else further(model)
        if inner is None:
            return {}
        model = inner
    return model.model_fields


def _choices(loc: Loc) -> tuple[Any, ...]:
    """Return the fixed choices of the setting at `loc`, or those of a mapping's keys, without null; empty if there are
    none."""
    annotation = _fields(loc[:-1])[str(loc[-1])].annotation
    return next((get_args(a) for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal), ())


def model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class in an annotation: the class itself, an optional one, or the item of a list."""
    candidates = (annotation, *get_args(annotation))
    return next((t for t in candidates if isinstance(t, type) and issubclass(t, BaseModel)), None)


def further(model: type[BaseModel]) -> type[BaseModel] | None:
    """Return the class of a section's entries whose names the user chooses; None if there are none."""
    if model.model_config.get("extra") != "allow":
        return None
    return model_of(get_args(get_type_hints(model)["__pydantic_extra__"])[1])


def _is_further(loc: Loc) -> bool:
    """Return whether the entry at `loc` has a name that the user chose."""
    return isinstance(loc[-1], str) and loc[-1] not in _fields(loc[:-1])


def all_settings(model: type[BaseModel], loc: Loc) -> Iterator[Loc]:
    for name, field in model.model_fields.items():
        yield (*loc, name)
        section = model_of(field.annotation)
        if section is not None:
            yield from all_settings(section, (*loc, name))


def dotted(loc: Loc) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


def given_text(value: Any) -> str:
    """Return a short text for a value as it was given."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f'the text "{value[:60]}"'
    return str(value).lower() if isinstance(value, bool) else str(value)
