"""`sdft submit`."""

from pathlib import Path
from typing import Annotated

import typer

from sdft.services.base.errors import UserError
from sdft.services.cli.commands.options import Config, Overrides


def submit(
    config: Config,
    address: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Address of the cluster's dashboard, such as http://HEAD:8265.", show_default=False
        ),
    ],
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(help="The run directory: an absolute path that all nodes see.", show_default=False)
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Run `sdft serve` there: the configuration has the section service.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Print the job's output, and exit with 1 if the job fails.")
    ] = False,
) -> int:
    """Send the current folder to a Ray cluster, and run `sdft train` or `sdft serve` there as a job."""
    import asyncio

    from sdft.services.cluster import submit as jobs
    from sdft.services.config.load import load_config
    from sdft.services.data.check_files import check_files

    given = overrides or []
    settings = load_config(config, given)
    if serve != (settings.service is not None):
        mend = "it has no section service; remove --serve" if serve else "it has the section service; add --serve"
        raise UserError(f"{config}: {mend}")
    check_files(settings, config.parent, sent=Path.cwd())
    job = jobs.submit(config, run_dir or settings.run_dir, given, address, "serve" if serve else "train")
    print(f"submitted as {job}; the same command again resumes a job that was stopped")
    if not follow:
        print(f"follow it with: ray job logs --follow --address {address} {job}")
        return 0
    try:
        done = asyncio.run(jobs.follow(job, address))
    except KeyboardInterrupt:
        print(f"\nno longer following; the job continues; stop it with: ray job stop --address {address} {job}")
        return 130
    return 0 if done else 1
