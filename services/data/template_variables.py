"""The variables that a run gives to the model's chat template (data.chat_template_kwargs), checked against it."""

import difflib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sdft.services.base.errors import UserError
from sdft.services.config.data import OWN_VARIABLES

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase


def check_variables(tokenizer: "PreTrainedTokenizerBase", names: Iterable[str]) -> None:
    """UserError if the chat template does not use a variable with one of these names: its value has no effect."""
    wanted = list(dict.fromkeys(names))
    templates = _parsed(tokenizer.chat_template) if wanted else []
    if not templates:
        return
    import jinja2.meta

    used = set().union(*map(jinja2.meta.find_undeclared_variables, templates)) - OWN_VARIABLES
    for name in wanted:
        if name in used:
            continue
        near = difflib.get_close_matches(name, used, n=1)
        others = sorted(used - set().union(*map(_set_first, templates)))
        mend = f"it uses {', '.join(others)}" if others else "it has no variables to set"
        raise UserError(
            f"data.chat_template_kwargs: the chat template of the tokenizer in {tokenizer.name_or_path} does not use "
            f"{name}; {f'did you mean {near[0]}?' if near else f'{mend}; remove {name}'}"
        )


def _parsed(chat_template: Any) -> "list[nodes.Template]":
    """Return the syntax tree of a template, or of each of several named ones; none if one cannot be parsed.

    Such a template is reported with the row that it fails on.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _generation_tag()])
    sources = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
    try:
        return [environment.parse(source) for source in sources]
    except (jinja2.TemplateSyntaxError, RecursionError):
        return []


def _set_first(template: "nodes.Template") -> set[str]:
    """Return the names that the template sets before it reads them: they are its own, also if set in branches."""
    contexts: dict[str, str] = {}
    for name in _names(template):
        contexts.setdefault(name.name, name.ctx)
    return {name for name, context in contexts.items() if context != "load"}


def _names(node: "nodes.Node") -> "Iterator[nodes.Name]":
    """Yield the names in the order in which the template reads and sets them: a value is read before it is set."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node
    inner = [node.node, node.target] if isinstance(node, nodes.Assign) else node.iter_child_nodes()
    for child in inner:
        yield from _names(child)


def _generation_tag() -> Any:
    """Return the extension for {% generation %}, which marks a reply in templates and renders what is in it."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    Generation.tags = {"generation"}
    return Generation
