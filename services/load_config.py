"""From a YAML file and `--set` overrides to a RunConfig; every mistake is one sentence that says how to mend it."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from services.config import RunConfig
from services.errors import UserError
from services.files import read_text
from services.sections import StageConfig
from services.strict_yaml import YamlError, dump_yaml, parse_yaml

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


class Problem(NamedTuple):
    """One mistake: where, and the rest of the sentence after `source: dotted.key`."""

    loc: Loc
    what: str


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file `path`, overrides like "training.batch_size=8" applied; or UserError."""
    data = _mapping(path, "model, data.train and training.epochs or training.steps")
    overridden = {_apply(data, override): override for override in overrides}
    return _validated(path, data, overridden)


def load_stage(path: Path, run: RunConfig) -> StageConfig:
    """One stage for this run, in a YAML file of its own; or UserError."""
    # As the only stage of a run: what is wrong with it is then said by what says it of a run's.
    given = _mapping(path, "name, data.train and epochs or steps")
    whole = run.model_dump(mode="json", include={"dtype", "device", "learner", "actors"})
    training = run.training.model_dump(include={"batch_size", "max_staleness"})
    data = whole | {"model": "any", "training": training, "stages": [given]}
    try:
        (stage,) = _validated(path, data, {}).stages
    except UserError as error:
        raise UserError(re.sub(r"stages\[0\](: |\.|(?= ))", "", str(error))) from None
    return stage


def _mapping(path: Path, least: str) -> dict[str, Any]:
    """The settings in a YAML file. `least`: what there must be."""
    try:
        data = parse_yaml(read_text(path))
    except YamlError as e:
        raise UserError(f"{path}:{e.line}: {e}") from None
    if data is None:
        raise UserError(f"{path}: the file is empty; give at least {least}")
    if not isinstance(data, dict):
        raise UserError(f"{path}: the file must be a mapping of settings (key: value), not {_given(data)}")
    return data


def _validated(path: Path, data: dict[str, Any], overridden: dict[Loc, str]) -> RunConfig:
    if data.get("dtype") == "auto":
        data = {key: value for key, value in data.items() if key != "dtype"}
    problems: list[Problem] = []
    config = None
    try:
        # Strict, through JSON: no true for 1 and no "8" for 8, but lists for tuples and whole numbers for floats.
        config = RunConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        problems = _explain(e)
    problems += [p for p in _loose_values(data, ()) if p.loc not in {q.loc for q in problems}]
    if config is not None and not problems:
        return config
    raise UserError(_report(path, overridden, problems))


def _report(path: Path, overridden: dict[Loc, str], problems: list[Problem]) -> str:
    """The sentence for the first problem, with the file or the override it comes from."""
    loc, what = problems[0]
    by_override = [text for o, text in overridden.items() if loc and (o[: len(loc)] == loc or loc[: len(o)] == o)]
    source = f"--set {by_override[0]}" if by_override else str(path)
    key = f"{_dotted(loc)}{'' if what.startswith(':') else ' '}"
    unset = "; --set KEY=null unsets what the file gives" if by_override and what.startswith(":") else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {key.lstrip()}{what}{unset}{more}"


def resolved_yaml(config: RunConfig) -> str:
    """Every setting of `config`, defaults included, as YAML that loads to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(data: dict[str, Any], override: str) -> Loc:
    """Set one "a.b=v" in `data`; returns its key. An item of a list goes by its name: stages.NAME.steps=20."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals:
        raise UserError(f"--set {override}: there is no =; write it as --set {override}=VALUE")
    if not all(parts):
        raise UserError(f"--set {override}: the key before = is not complete; write it as --set section.key=VALUE")
    try:
        value = parse_yaml(text)
    except YamlError as e:
        raise UserError(f"--set {override}: the value is not valid YAML: {e}; put text in quotes") from None
    section: Any = data
    loc: Loc = ()
    for part in parts[:-1]:
        if isinstance(section, list):
            loc += (_item(section, part, f"--set {override}: {_dotted(loc)}"),)
        else:
            if section.get(part) is None:
                section[part] = {}
            loc += (part,)
        section = section[loc[-1]]
        if not isinstance(section, (dict, list) if len(loc) < len(parts) - 1 else dict):
            raise UserError(f"--set {override}: {_dotted(loc)} is no mapping; set it as a whole")
    section[parts[-1]] = value
    return (*loc, parts[-1])


def _item(items: list[Any], name: str, what: str) -> int:
    """Place of the item with this name. what: beginning of the sentence if there is none."""
    places = {str(item["name"]): i for i, item in enumerate(items) if isinstance(item, dict) and "name" in item}
    if name not in places:
        there = f"there are {', '.join(places)}" if places else "its items have no names; set it as a whole"
        raise UserError(f"{what} has no item {name}; {there}")
    return places[name]


def _explain(error: ValidationError) -> list[Problem]:
    """Unknown keys first, because a mistyped key is often the cause of a missing one, which is then left out."""
    errors = error.errors(include_url=False)
    problems, meant = [], set()
    for e in errors:
        if e["type"] == "extra_forbidden":
            parent, key = e["loc"][:-1], str(e["loc"][-1])
            what, suggestion = _unknown(parent, key)
            problems.append(Problem(e["loc"], what))
            meant.add(suggestion)
    for e in errors:
        if e["loc"][-1:] == ("[key]",):
            problems.append(Problem(e["loc"][:-1], _no_column(e["loc"][:-1])))
        elif e["type"] != "extra_forbidden" and not (e["type"] == "missing" and e["loc"] in meant):
            problems.append(Problem(e["loc"], _sentence(e["type"], e["loc"], e["input"], e.get("ctx", {}), e["msg"])))
    return problems


def _unknown(parent: Loc, key: str) -> tuple[str, Loc | None]:
    """What to say of an unknown key, and the place of the setting that was probably meant."""
    names = list(_fields(parent))
    # What a stage sets is said of the run, but to whoever writes a stage.
    settings = [loc for loc in _all_settings(RunConfig, ()) if loc[0] != "stages" or parent[:1] == ("stages",)]
    elsewhere = [loc for loc in settings if loc[-1] == key]
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.8 if elsewhere else 0.6)
    if near:
        loc = (*parent, near[0])
        return f"is not a setting; did you mean {_dotted(loc)}?", loc
    if elsewhere:
        return f"is not a setting; did you mean {' or '.join(map(_dotted, elsewhere))}?", None
    return f"is not a setting; {_dotted(parent) or 'the file'} has {', '.join(names)}", None


def _no_column(loc: Loc) -> str:
    """What to say of a name in `columns`, the only mapping whose keys are fixed."""
    columns = _choices(loc[:-1])
    near = difflib.get_close_matches(str(loc[-1]), columns, n=1)
    if near:
        return f"is no column; did you mean {_dotted((*loc[:-1], near[0]))}?"
    return f"is no column; there are {', '.join(columns)}"


def _sentence(kind: str, loc: Loc, given: Any, ctx: dict[str, Any], message: str) -> str:
    if kind == "missing":
        if isinstance(loc[-1], int):
            return "is missing from the list"
        description = _fields(loc[:-1])[str(loc[-1])].description
        return "is required but missing" + (
            f"; it is: {description[0].lower()}{description[1:]}" if description else ""
        )
    if kind == "value_error":
        return f": {ctx['error']}" if loc else str(ctx["error"])
    if kind in _EXPECTED:
        mend = "; put it in quotes" if kind == "string_type" and isinstance(given, int | float) else ""
        if kind == "model_type" and given is None:
            mend = "; give its settings or remove the key"
        return f"must be {_EXPECTED[kind]}, not {_given(given)}{mend}"
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"must be {words} {ctx[name]:g}, not {_given(given)}"
    if kind == "literal_error":
        options = [str(o) for o in _choices(loc)]
        near = difflib.get_close_matches(str(given), options, n=1) if isinstance(given, str) else []
        mend = f"; did you mean {near[0]}?" if near else ""
        return f"must be {' or '.join(options)}, not {_given(given)}{mend}"
    if kind == "string_pattern_mismatch":
        return f"must match {ctx['pattern']}, which {_given(given)} does not"
    if kind == "too_long":
        return f"must have {ctx['max_length']} items, not {ctx['actual_length']}"
    return f"is not right: {message[0].lower()}{message[1:]} (given: {_given(given)})"


def _loose_values(value: Any, loc: Loc) -> Iterator[Problem]:
    """What strict validation lets pass: true for a 1 among fixed choices, and numbers that are not finite."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _loose_values(inner, (*loc, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _loose_values(inner, (*loc, i))
    elif isinstance(value, float) and not math.isfinite(value):
        yield Problem(loc, f"must be a finite number, not {value}")
    elif isinstance(value, bool) and isinstance(loc[-1], str) and loc[-1] in _fields(loc[:-1]):
        options = _choices(loc)
        if options and all(type(o) is int for o in options):
            yield Problem(loc, f"must be {' or '.join(map(str, options))}, not {_given(value)}")


def _fields(section: Loc) -> dict[str, FieldInfo]:
    """The settings of the section at `section`; empty if there is no such section."""
    model: type[BaseModel] = RunConfig
    for part in section:
        if isinstance(part, int):
            continue  # an item of a list of sections has the list's model
        if part not in model.model_fields:
            return {}
        annotation = model.model_fields[part].annotation
        inner = _model_of(annotation)
        if inner is None:
            return {}
        model = inner
    return model.model_fields


def _choices(loc: Loc) -> tuple[Any, ...]:
    """The fixed choices of the setting at `loc`, whether null is one more or they are a mapping's keys; empty if it has
    none."""
    annotation = _fields(loc[:-1])[str(loc[-1])].annotation
    return next((get_args(a) for a in (annotation, *get_args(annotation)) if get_origin(a) is Literal), ())


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is, may be, or is a list of."""
    kinds = (annotation, *get_args(annotation))
    return next((t for t in kinds if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _all_settings(model: type[BaseModel], loc: Loc) -> Iterator[Loc]:
    for name, field in model.model_fields.items():
        yield (*loc, name)
        section = _model_of(field.annotation)
        if section is not None:
            yield from _all_settings(section, (*loc, name))


def _dotted(loc: Loc) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


def _given(value: Any) -> str:
    """A value as it was given, short."""
    if value is None:
        return "empty"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        return f'the text "{value[:60]}"'
    return str(value).lower() if isinstance(value, bool) else str(value)
