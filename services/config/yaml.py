"""YAML for configurations: a key given twice is an error, 1e-5 is a number, a date is text."""

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, where a float needs a dot and a signed exponent, so that 1e-5 would be text.
_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$")
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """SafeLoader that accepts only text keys, each once in a mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"the key {key.value} is given twice (first in line {seen[key.value]}); remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen[key.value] = line
        self.flatten_mapping(node)
        # Keys stay as written: YAML 1.1 would turn `on` and `no` into booleans.
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


def _construct_map(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text that _Loader would read as a number."""


def _resolvers(base: dict[str, Any]) -> dict[str, Any]:
    without_dates = {first: [r for r in rules if r[0] != _TIMESTAMP] for first, rules in base.items()}
    for first in "-+0123456789":
        without_dates[first] = [*without_dates.get(first, []), ("tag:yaml.org,2002:float", _EXPONENT)]
    return without_dates


_Loader.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)
_Dumper.yaml_implicit_resolvers = _resolvers(yaml.SafeDumper.yaml_implicit_resolvers)
# Plain data only: no dates, sets or bytes, even with an explicit tag.
_PLAIN = ("null", "bool", "int", "float", "str", "seq")
_Loader.yaml_constructors = {
    None: yaml.SafeLoader.yaml_constructors[None],
    **{tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"tag:yaml.org,2002:{name}" for name in _PLAIN)},
    "tag:yaml.org,2002:map": _construct_map,
}


class YamlError(ValueError):
    """Text that is not YAML; `line` counts from 1."""

    def __init__(self, problem: str, line: int) -> None:
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Return the value of one YAML document. Raises YamlError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        problem = ": ".join(part for part in (e.context, e.problem) if part)
        raise YamlError(problem or "not valid YAML", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as e:
        line = text[: e.position].count("\n") + 1
        raise YamlError(f"the character {chr(e.character)!r} is not allowed; remove it", line) from None
    except (ValueError, RecursionError) as e:  # an integer of ten thousand digits, brackets a thousand deep
        raise YamlError(str(e), 1) from None


def dump_yaml(value: Any) -> str:
    """Return the YAML text of plain data, in the given order. parse_yaml returns the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
