"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The configuration, a YAML file.", show_default=False)]
RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=v", help="Override a setting; may be given several times.", show_default=False),
]
