"""`sdft status`, `report` and `matrix`: what a run directory says."""

from pathlib import Path
from typing import Annotated

import typer

from sdft.services.base.errors import PreflightError
from sdft.services.base.files import check_output
from sdft.services.cli.commands.options import RunDir


def status(run_dir: RunDir) -> None:
    """Show the state of a run or a service."""
    from sdft.services.serving.folder import ServiceFolder

    if ServiceFolder(run_dir).journal.exists():
        from sdft.services.serving.status import service_text

        print(service_text(run_dir))
        return
    from sdft.services.analysis.status import status_text

    print(status_text(run_dir))


def report(run_dir: RunDir) -> None:
    """Write a run's report.html."""
    from sdft.services.analysis.report import write_report
    from sdft.services.records.run_dir import check_run_dir

    check_run_dir(run_dir)
    check_output(run_dir / "report.html")
    try:
        path = write_report(run_dir)
    except OSError as error:
        raise PreflightError(f"{run_dir}: the report could not be written ({error}); mend that") from None
    print(path)


def matrix(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="The run directory. Of several runs, which may differ only in seed, the mean and its 95 % interval.",
            show_default=False,
        ),
    ],
) -> None:
    """Show the accuracy of every task before training and after each stage."""
    from sdft.services.analysis.matrix import matrix_text, read_matrix

    print(matrix_text([read_matrix(run_dir) for run_dir in run_dirs]))
