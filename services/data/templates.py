"""A user's Jinja template for the teacher's last message, rendered in a sandbox; errors name its file and line."""

import traceback
from pathlib import Path
from typing import Any

from sdft.services.base.errors import UserError, first_line
from sdft.services.base.files import read_text


class UserTemplate:
    """The template in the file `path`.

    Variables: prompt (last user text), demonstration, context, feedback, messages. UserError if the template cannot
    be parsed or uses none of demonstration, context and feedback.
    """

    def __init__(self, path: Path) -> None:
        from jinja2 import StrictUndefined, Template, TemplateSyntaxError, meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._path = path
        source = read_text(path)
        env = ImmutableSandboxedEnvironment(undefined=StrictUndefined)
        del env.filters["random"], env.globals["lipsum"]  # non-deterministic prompts would prevent a resume
        try:
            used = meta.find_undeclared_variables(env.parse(source))
            code = env.compile(source, filename=str(path))
        except TemplateSyntaxError as e:
            raise UserError(f"{path}:{e.lineno}: not a valid Jinja template: {e.message}") from None
        except (RecursionError, SyntaxError) as e:  # nested too deep for Jinja's or Python's parser
            raise UserError(f"{path}: not a valid Jinja template: {e}; nest it less") from None
        knowledge = [column for column in ("demonstration", "context", "feedback") if column in used]
        if not knowledge:
            raise UserError(
                f"{path}: uses neither demonstration nor context nor feedback, so teacher and student would see the "
                "same; put {{ demonstration }} into the template"
            )
        self.shown = knowledge[0]  # the column that rows must have
        self._template = Template.from_code(env, code, env.make_globals(None))

    def render(self, where: str, **variables: Any) -> str:
        """Render the text for the item at `where`. UserError, with the template's line, if it fails or is empty."""
        try:
            text = self._template.render(**variables)
        except Exception as e:  # noqa: BLE001 - a template is a user's program: it can raise anything
            frames = traceback.extract_tb(e.__traceback__)
            line = next((f.lineno for f in reversed(frames) if f.filename == str(self._path)), None)
            at = f"{self._path}:{line}" if line else str(self._path)
            names = ", ".join(variables)
            raise UserError(f"{at}: {first_line(e)} (for {where}); the variables are {names}") from None
        if not text.strip():
            raise UserError(f"{self._path}: renders an empty message for {where}; change the template or the row")
        return text
