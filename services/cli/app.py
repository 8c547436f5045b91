"""The names of the commands, in groups; help and the parsing of the command line.

words ─► parse ─► the command as a function without arguments ─► main.py runs it
"""

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from sdft.services.cli.commands.evaluate import evaluate
from sdft.services.cli.commands.look import matrix, report, status
from sdft.services.cli.commands.serve import serve
from sdft.services.cli.commands.service import promote, records, releases, rollback, tokens
from sdft.services.cli.commands.submit import submit
from sdft.services.cli.commands.take import export, model, replay
from sdft.services.cli.commands.train import check, train

COMMANDS: dict[str, dict[str, Callable[..., int | None]]] = {
    "Train": {"check": check, "train": train, "submit": submit},
    "Serve": {
        "serve": serve,
        "releases": releases,
        "records": records,
        "promote": promote,
        "rollback": rollback,
        "tokens": tokens,
    },
    "Look at a run": {"status": status, "report": report, "matrix": matrix},
    "Take out and compare": {"export": export, "eval": evaluate, "replay": replay, "model": model},
}
Command = functools.partial[int | None]


def parse(words: Sequence[str]) -> Command | int:
    """Return the command that the words name, or the exit code after help or a mistake, which are printed."""
    parsed: list[Command] = []
    try:
        _app(parsed.append)(list(words))
    except SystemExit as end:
        if not parsed:
            return int(end.code or 0)
    return parsed[0]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdft {version('sdft')}")
        raise typer.Exit


def _app(found: Callable[[Command], None]) -> typer.Typer:
    """Return typer's application. Its commands do not run: they pass themselves, with their arguments, to found()."""
    app = typer.Typer(
        name="sdft",
        help="Self-distillation fine-tuning on Ray, vLLM and DeepSpeed.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def deferred(command: Callable[..., int | None]) -> Callable[..., None]:
        @functools.wraps(command)
        def defer(**arguments: object) -> None:
            found(functools.partial(command, **arguments))

        return defer

    for group, commands in COMMANDS.items():
        for name, command in commands.items():
            app.command(name, rich_help_panel=group)(deferred(command))

    @app.callback()
    def _options(
        show: Annotated[
            bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
        ] = False,
    ) -> None:
        pass

    return app
