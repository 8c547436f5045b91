"""`sdft eval`: a configuration's sets, kept replies, or lm-eval's tasks."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.files import check_output_file, write_atomically
from sdft.services.base.output import lasting_output
from sdft.services.cli.commands.failures import explaining
from sdft.services.cli.commands.options import Config, Overrides

if TYPE_CHECKING:
    from sdft.services.records.rows import EvalResult


def evaluate(
    config: Config,
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Use this model folder instead of the config's model.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write results and all replies to this file, as JSON lines.", show_default=False
        ),
    ] = None,
    regrade: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Grade the replies in an earlier --out again, without a model.", show_default=False
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="TASK,…", help="Run these benchmarks of lm-eval instead, such as hellaswag.", show_default=False
        ),
    ] = None,
    harness_tasks: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder with your own task files for lm-eval.", show_default=False),
    ] = None,
    harness_limit: Annotated[
        int | None, typer.Option(metavar="N", help="Questions per benchmark (default: all).", show_default=False)
    ] = None,
) -> None:
    """Run a configuration's evaluation sets on a model, without training."""
    from rich.console import Console

    from sdft.services.config.load import load_config
    from sdft.services.planning.prepare import prepare

    if regrade and model:
        raise UserError("--regrade grades the replies in a file, without a model; remove --regrade or --model")
    # A path on the command line is relative to the working directory, one in the file to the file's folder.
    named = [f"model={json.dumps(str(_local(model)))}"] if model else []
    settings = load_config(config, [*(overrides or []), *named])
    if out:
        check_output_file(out, "--out")
    if harness:
        from sdft.services.evaluation.lm_eval import run_harness, scores
        from sdft.services.planning.examined import examined
        from sdft.services.planning.models import resolve_model

        folder = resolve_model(settings.model, config.parent)
        with examined(folder, trains=False):
            pass
        content = run_harness(settings, folder, harness, harness_tasks, harness_limit)
        _show(scores(json.loads(content)), out, "results", lambda path: write_atomically(path, content))
        return
    if not settings.sets:
        raise UserError(f"{config}: evaluation.sets is empty; give at least one set to evaluate")
    from sdft.services.evaluation import replies as kept

    if regrade:
        results, replies = kept.regrade(settings, config.parent, regrade)
    else:
        prepared = prepare(settings, config, trains=False)
        from sdft.services.cli.evaluate import evaluate as run

        with explaining(None):
            results, replies = run(prepared, Console(file=lasting_output()))
    lines = map(_line, results)
    _show(lines, out, "results and replies", lambda path: kept.write_replies(path, results, replies))


def _local(model: str) -> Path | str:
    return Path(model).absolute() if Path(model).exists() else model


def _line(r: "EvalResult") -> str:
    from sdft.services.records.rows import PERPLEXITY
    from sdft.services.records.text import percent

    if r.metric == PERPLEXITY:
        return f"{r.label:<24}{r.text}  n {r.n} tokens"
    low, high = r.interval
    return f"{r.label:<24}{percent(r.value):>8}  n {r.n:<5} 95 % interval {percent(low)} to {percent(high)}"


def _show(lines: Iterable[object], out: Path | None, what: str, write: Callable[[Path], None]) -> None:
    """Print the lines and write the file of --out, each even if the other fails."""
    try:
        print(*lines, sep="\n", flush=True)
    finally:
        try:
            if out:
                write(out)
        except OSError as error:
            raise PreflightError(
                f"--out {out}: the {what} could not be written ({error}); the results above are complete"
            ) from None
    if out:
        print(f"{what}: {out}")
