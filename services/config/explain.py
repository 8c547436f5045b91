"""pydantic's errors as sentences: the key, what is wrong with its value, and the fix."""

import difflib
import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sdft.services.algorithms.registry import OWN
from sdft.services.config.run import RunConfig

Loc = tuple[str | int, ...]
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a mapping of settings",
    "dict_type": "a mapping",
}
_LIMITS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_LOSS = (
    "it is part of method: set method.divergence (forward, reverse, jsd or sampled; or its type, top_k and beta), "
    "method.skip_first and method.importance"
)
_EXECUTION = "set execution: eager in place of true, and execution: compiled in place of false"
# Removed settings, without the numbers of list items and with * for the name of a pool, and what to set instead.
_REPLACED: dict[Loc, str] = {
    ("evaluation", "timeout_s"): (
        "set actors.batch_timeout_s for rollouts, scores and replies, and evaluation.grading_timeout_s for a judge and "
        "lm-eval"
    ),
    ("loss",): _LOSS,
    ("stages", "loss"): _LOSS,
    ("actors", "*", "enforce_eager"): _EXECUTION,
    ("service", "serving", "enforce_eager"): _EXECUTION,
}


class Problem(NamedTuple):
    """One mistake: its place, and the rest of the sentence after `source: dotted.key`."""

    loc: Loc
    text: str


def explain(error: ValidationError) -> list[Problem]:
    """Return the problems, unknown keys first.

    A mistyped key often causes a missing one. The missing key that an unknown one was meant for is left out.
    """
    # pydantic reports a default that needs other settings as missing when one of those is wrong.
    errors = [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]
    problems, meant = [], set()
    for e in errors:
        if e["type"] == "extra_forbidden":
            parent, key = e["loc"][:-1], str(e["loc"][-1])
            text, suggestion = _unknown(parent, key)
            problems.append(Problem(_without_tags(e["loc"]), text))
            meant.add(suggestion)
    for e in errors:
        if e["type"] == "model_type" and _is_further(e["loc"]):  # a value, so it is meant as a setting
            problems.append(Problem(_without_tags(e["loc"]), _unknown(e["loc"][:-1], str(e["loc"][-1]))[0]))
        elif e["loc"][-1:] == ("[key]",):
            problems.append(Problem(e["loc"][:-1], _no_column(e["loc"][:-1])))
        elif e["type"] != "extra_forbidden" and not (e["type"] == "missing" and e["loc"] in meant):
            text = _sentence(e["type"], e["loc"], e["input"], e.get("ctx", {}), e["msg"])
            problems.append(Problem(_without_tags(e["loc"]), text))
    return problems


def _unknown(parent: Loc, key: str) -> tuple[str, Loc | None]:
    """Return the message for an unknown key, and the place of the setting that was probably meant."""
    place = tuple(part for part in (*_without_tags(parent), key) if not isinstance(part, int))
    replaced = _REPLACED.get((place[0], "*", *place[2:]) if place[0] == "actors" else place)
    if replaced is not None:
        return f"is not a setting any more; {replaced}", None
    kinds = _kinds_with(parent, key)
    if kinds:
        have = "has" if len(kinds) == 1 else "have"
        return f"is not a setting with type: {parent[-1]}; only {' and '.join(kinds)} {have} it", None
    names = list(_fields(parent))
    # Settings of a stage or a service are suggested only for keys inside them. Elsewhere the run's own settings are.
    own = ("stages", "service")
    settings = [loc for loc in all_settings(RunConfig, ()) if loc[0] not in own or parent[:1] == loc[:1]]
    elsewhere = [loc for loc in settings if loc[-1] == key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.8 if elsewhere else 0.6)
    if near:
        loc = (*parent, near[0])
        return f"is not a setting; did you mean {dotted(loc)}?", loc
    if elsewhere:
        return f"is not a setting; did you mean {' or '.join(map(dotted, elsewhere))}?", None
    return f"is not a setting; {dotted(parent) or 'the file'} has {', '.join(names)}", None


def _kinds_with(section: Loc, key: str) -> list[str]:
    """Return the kinds of a section that have a setting; none if the section is not one of several kinds."""
    if not section or section[-1] not in _tags(_models(section[:-1])):
        return []
    return [tag_of(model) for model in _models(section[:-1]) if key in model.model_fields]


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
    if error_type == "union_tag_invalid":
        kinds = _kinds_at(loc)
        own = ", or a class of your own as package.module:Name" if OWN in ctx["expected_tags"] else ""
        near = difflib.get_close_matches(ctx["tag"], kinds, n=1)
        mend = f"; did you mean {near[0]}?" if near else ""
        return f'must be {" or ".join(kinds)}{own}, not the text "{ctx["tag"]}"{mend}'
    if error_type == "union_tag_not_found":
        return f"must be text or a mapping of settings, not {given_text(given)}"
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


def _models(section: Loc) -> list[type[BaseModel]]:
    """Return the models of the section at `section`: several if it is one of several kinds; none if there is none."""
    models: list[type[BaseModel]] = [RunConfig]
    for part in section:
        if isinstance(part, int):
            continue  # an item of a list of sections has the list's model
        if part in _tags(models):
            models = [model for model in models if tag_of(model) == part]
            continue
        field = next((model.model_fields[part] for model in models if part in model.model_fields), None)
        models = further(models) if field is None else models_of(field.annotation)
    return models


def tag_of(model: type[BaseModel]) -> str:
    """Return the `type` of one kind of section."""
    field = model.model_fields["type"]
    return OWN if field.is_required() else str(field.default)


def _tags(models: list[type[BaseModel]]) -> list[str]:
    """Return the tags with which pydantic tells the kinds of a section apart; none if there is one kind."""
    return [tag_of(model) for model in models] if len(models) > 1 else []


def _kinds_at(loc: Loc) -> list[str]:
    """Return the values of `type` at a section that is one of several kinds."""
    return [tag for tag in _tags(_models(loc)) if tag != OWN]


def _without_tags(loc: Loc) -> Loc:
    """Return the place in the file: pydantic puts the kind of a section behind the section's name."""
    kept: Loc = ()
    for i, part in enumerate(loc):
        if part not in _tags(_models(loc[:i])):
            kept += (part,)
    return kept


def _fields(section: Loc) -> dict[str, FieldInfo]:
    """Return the settings of the section at `section`, of all its kinds; empty if there is no such section."""
    return {name: field for model in _models(section) for name, field in model.model_fields.items()}


def _choices(loc: Loc) -> tuple[Any, ...]:
    """Return the fixed choices of the setting at `loc`, or those of a mapping's keys, without null; empty if there are
    none."""
    annotation = _fields(loc[:-1])[str(loc[-1])].annotation
    return next((get_args(a) for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal), ())


def models_of(annotation: Any) -> list[type[BaseModel]]:
    """Return the section classes in an annotation: the class itself, an optional one, the item of a list, or kinds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in models_of(inner)]


def further(models: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """Return the classes of a section's entries whose names the user chooses; none if it has no such entries."""
    allow = [model for model in models if model.model_config.get("extra") == "allow"]
    return [entry for model in allow for entry in models_of(get_type_hints(model)["__pydantic_extra__"])]


def _is_further(loc: Loc) -> bool:
    """Return whether the entry at `loc` has a name that the user chose."""
    return isinstance(loc[-1], str) and loc[-1] not in _fields(loc[:-1])


def all_settings(model: type[BaseModel], loc: Loc) -> Iterator[Loc]:
    found: dict[Loc, None] = {}
    for name, field in model.model_fields.items():
        found[*loc, name] = None
        for section in models_of(field.annotation):
            found |= dict.fromkeys(all_settings(section, (*loc, name)))
    yield from found


def dotted(loc: Loc) -> str:
    loc = _without_tags(loc)
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
