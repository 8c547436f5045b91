"""`sdft serve`."""

import time
from pathlib import Path
from typing import Annotated

import typer

from sdft.services.base.output import lasting_output
from sdft.services.cli.commands.options import Overrides


def serve(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG|RUN|SERVICE",
            help="A configuration with a section service, a run directory to serve on, or a service's folder.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="The service's folder (default: runs/<config name>, or RUN/service).", show_default=False),
    ] = None,
) -> None:
    """Serve a model that learns from what it is taught over HTTP. The same command goes on after a stop."""
    from sdft.services.base.signals import run_until_stopped, stop_on_signals
    from sdft.services.serving.check import check_service
    from sdft.services.serving.start import serve as run
    from sdft.services.serving.target import service_of

    config, folder = service_of(target, overrides or [], run_dir)
    checked = check_service(config, folder)
    output = lasting_output()

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=output, flush=True)

    say(f"service in {folder.path}: {config.model} in {config.dtype}")

    async def stopping() -> None:
        stop_on_signals()
        await run(checked, say)

    run_until_stopped(stopping())
