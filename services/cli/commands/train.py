"""`sdft train` and `sdft check`."""

from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from sdft.services.base.output import lasting_output
from sdft.services.cli.commands.failures import explaining
from sdft.services.cli.commands.options import Config, Overrides


def train(
    config: Config,
    overrides: Overrides = None,
    run_dir: Annotated[
        str | None, typer.Option(help="The run directory (default: runs/<config name>).", show_default=False)
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: from the newest whole checkpoint, if there is one; never: a new run; PATH: this checkpoint.",
        ),
    ] = "auto",
    append: Annotated[
        Path | None, typer.Option(metavar="STAGE.yaml", help="Add this stage to a run that exists.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved config and the plan, and start nothing.")
    ] = False,
) -> None:
    """Train, or continue a run that was stopped."""
    from rich.console import Console

    from sdft.services.cli.summary import print_outcome, run_lines
    from sdft.services.config.load import load_config, resolved_yaml
    from sdft.services.planning.prepare import prepare
    from sdft.services.records.checkpoints import begun

    path, given = config, overrides or []
    settings = load_config(path, given)
    folder = Path(run_dir or settings.run_dir or Path("runs") / path.stem)
    if append:
        from sdft.services.config.append import appended

        settings, path = appended(folder, path.parent, given, append), folder / "config.yaml"
    prepared = prepare(settings, path, begun=begun(folder, resume))
    output = lasting_output()
    console = Console(file=output)
    shape = prepared.shape
    size = f"{shape.parameters / 1e6:.1f} M parameters"
    if shape.adapters:
        size += f" (LoRA trains {shape.adapters / 1e6:.1f} M)"
    lines = [f"{size} in {settings.dtype}", *run_lines(prepared)]
    console.print(*lines, sep="\n", markup=False, highlight=False, soft_wrap=True)
    console.print(prepared.plan.text(), markup=False, highlight=False)
    if dry_run:
        print(resolved_yaml(prepared.config))
        return
    from sdft.services.cli.train import train as run

    with explaining(folder):
        report = run(prepared, folder, resume, console)
    with redirect_stdout(output):
        print_outcome(folder)
    if report is not None:
        console.print(f"report: {report}", markup=False, soft_wrap=True)


def check(
    config: Config,
    overrides: Overrides = None,
    show: Annotated[
        int | None,
        typer.Option(
            "--show",
            metavar="N",
            min=1,
            help="Print the first N rows of each stage as the model will see them, with the loss tokens in colour.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check configuration, data, prompts and the GPUs' memory without starting anything."""
    from sdft.services.cli.summary import run_lines
    from sdft.services.config.load import load_config
    from sdft.services.planning.gpu_fit import check_gpu_memory
    from sdft.services.planning.prepare import prepare

    prepared = prepare(load_config(config, overrides or []), config)
    prompts = [p.teacher_ids for stage in prepared.stages for p in stage.prompts if p.teacher_ids is not None]
    longest = max(map(len, prompts), default=0)
    print(f"{config}: valid; the longest teacher prompt has {longest} tokens")
    print(*run_lines(prepared), sep="\n")
    print(f"evaluation: {', '.join(s.settings.name for s in prepared.sets) or 'none'}")
    print(prepared.plan.text())
    check_gpu_memory(prepared.plan)
    if show:
        from sdft.services.cli.shown import shown_rows

        print(shown_rows(prepared, show), end="")
