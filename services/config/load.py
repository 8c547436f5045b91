"""Load a RunConfig from a YAML file and `--set` overrides. Every mistake is one sentence with its fix."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sdft.services.base.errors import UserError
from sdft.services.base.files import read_text
from sdft.services.config.explain import Loc, Problem, dotted, explain, given_text, loose_values
from sdft.services.config.run import RunConfig
from sdft.services.config.sections import StageConfig
from sdft.services.config.service import with_records_of_a_service
from sdft.services.config.yaml import YamlError, dump_yaml, parse_yaml

SHORT = ("method", "divergence", "expert")  # sections that may be given as the text of their `type`


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the YAML file `path` and apply overrides like "training.batch_size=8". Raises UserError."""
    data = _mapping(path, "model, data.train and training.epochs or training.steps")
    overridden = {_apply(data, override): override for override in overrides}
    return _validated(path, data, overridden)


def load_stage(path: Path, run: RunConfig) -> StageConfig:
    """Load one stage for this run from its own YAML file. Raises UserError."""
    # Validated as the only stage of a run, so that its mistakes get the same sentences as those of a run.
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
    """Return the settings in a YAML file. `least`: the required settings, for the error message."""
    try:
        data = parse_yaml(read_text(path))
    except YamlError as e:
        raise UserError(f"{path}:{e.line}: {e}") from None
    if data is None:
        raise UserError(f"{path}: the file is empty; give at least {least}")
    if not isinstance(data, dict):
        raise UserError(f"{path}: the file must be a mapping of settings (key: value), not {given_text(data)}")
    return data


def _validated(path: Path, data: dict[str, Any], overridden: dict[Loc, str]) -> RunConfig:
    if data.get("dtype") == "auto":
        data = {key: value for key, value in data.items() if key != "dtype"}
    try:
        data = with_records_of_a_service(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    problems: list[Problem] = []
    config = None
    try:
        # Strict, through JSON: rejects true for 1 and "8" for 8, accepts lists for tuples and whole numbers for floats.
        config = RunConfig.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as e:
        problems = explain(e)
    problems += [p for p in loose_values(data, ()) if p.loc not in {q.loc for q in problems}]
    if config is not None and not problems:
        return config
    raise UserError(_report(path, overridden, problems))


def _report(path: Path, overridden: dict[Loc, str], problems: list[Problem]) -> str:
    """Return the sentence for the first problem, with the file or the override that it comes from."""
    loc, text = problems[0]
    by_override = [given for o, given in overridden.items() if loc and (o[: len(loc)] == loc or loc[: len(o)] == o)]
    source = f"--set {by_override[0]}" if by_override else str(path)
    key = f"{dotted(loc)}{'' if text.startswith(':') else ' '}"
    combined = bool(by_override) and text.startswith(":") and loc not in overridden  # with other settings of the file
    unset = "; --set KEY=null removes a setting of the file" if combined else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{source}: {key.lstrip()}{text}{unset}{more}"


def resolved_yaml(config: RunConfig) -> str:
    """Return every setting of `config`, defaults included, as YAML that loads to an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _apply(data: dict[str, Any], override: str) -> Loc:
    """Set one "a.b=v" in `data` and return its key. A list item is addressed by its name: stages.NAME.steps=20."""
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
            loc += (_item(section, part, f"--set {override}: {dotted(loc)}"),)
        else:
            if section.get(part) is None:
                section[part] = {}
            elif part in SHORT and isinstance(section[part], str):
                section[part] = {"type": section[part]}
            loc += (part,)
        section = section[loc[-1]]
        if not isinstance(section, (dict, list) if len(loc) < len(parts) - 1 else dict):
            raise UserError(
                f"--set {override}: {dotted(loc)} is not a mapping; write --set {'.'.join(parts[: len(loc)])}=VALUE"
            )
    section[parts[-1]] = value
    return (*loc, parts[-1])


def _item(items: list[Any], name: str, prefix: str) -> int:
    """Return the index of the item with this name. prefix: beginning of the error sentence if there is none."""
    places = {str(item["name"]): i for i, item in enumerate(items) if isinstance(item, dict) and "name" in item}
    if name not in places:
        mend = f"its items are {', '.join(places)}" if places else "its items have no names; set the whole list"
        raise UserError(f"{prefix} has no item {name}; {mend}")
    return places[name]
