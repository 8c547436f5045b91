"""`sdft export`, `replay` and `model`: what a run or the cache has is taken out or repeated."""

import shutil
from pathlib import Path
from typing import Annotated

import typer

from sdft.actors.shared.model_files import ADAPTER_CONFIG, ORIGIN, read_json
from sdft.services.base.errors import PreflightError, UserError
from sdft.services.base.files import check_output, part_name
from sdft.services.base.output import lasting_output
from sdft.services.cli.commands.options import RunDir


def export(
    run_dir: RunDir,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write, which must not exist.", show_default=False)
    ],
    step: Annotated[
        int | None, typer.Option(help="Step of the checkpoint (default: the newest).", show_default=False)
    ] = None,
) -> None:
    """Write the student of a checkpoint as a Hugging Face folder."""
    from sdft.services.records.checkpoints import damage, folder_of, newest_usable

    check_output(out, "--out")
    if out.exists():
        raise UserError(f"--out {out} exists already; name a new folder")
    folder, notes = newest_usable(run_dir) if step is None else (folder_of(run_dir, step), [])
    for note in notes:
        print(note)
    if folder is None or not folder.is_dir():
        raise UserError(f"{run_dir} has no checkpoint{'' if step is None else f' of step {step}'}; see `sdft status`")
    # newest_usable() has checked the folder that it returns.
    if step is not None and (reason := damage(folder)) is not None:
        raise UserError(f"{folder} cannot be exported: {reason}")
    part = out.with_name(part_name(out))
    shutil.rmtree(part, ignore_errors=True)
    try:
        _export_student(folder / "student", part)
        part.rename(out)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise PreflightError(
            f"--out {out}: the model could not be written ({error}); free disk space, or name another folder"
        ) from None
    print(f"{out}: the student of {folder.name}, a plain Hugging Face folder")


def _export_student(student: Path, out: Path) -> None:
    """Write a checkpoint's student: adapters merged, and the text part of a multimodal model in the whole model."""
    _export_merged(student, out)
    if not (out / ORIGIN).exists():
        return
    from sdft.learner.weights.text_part import Origin, WholeGone, join

    origin, text = Origin.of(out), out.with_name(f"{out.name}-text")
    shutil.rmtree(text, ignore_errors=True)  # of an export that was killed
    out.rename(text)
    try:
        join(text, origin, out)
    except WholeGone as error:
        raise UserError(
            f"{student} is the text part of a multimodal model, which is not whole: {error}; {_back(origin.folder)}"
        ) from None
    finally:
        shutil.rmtree(text, ignore_errors=True)


def _back(folder: Path) -> str:
    """Return what brings back a folder that an export needs."""
    from sdft.services.planning.models import cache_folder

    if folder.is_relative_to(cache_folder()):
        return "run `sdft check` with the run's config.yaml, which makes that folder again"
    return "put that folder back"


def _export_merged(student: Path, out: Path) -> None:
    if not (student / ADAPTER_CONFIG).exists():
        out.mkdir(parents=True)
        for path in student.iterdir():
            shutil.copyfile(path, out / path.name)  # without permissions
        return
    from sdft.learner.weights.export import BaseModelGone, merge_adapter

    try:
        merge_adapter(student, out)
    except (BaseModelGone, ValueError) as error:
        base = Path(read_json(student / ADAPTER_CONFIG)["base_model_name_or_path"])
        raise UserError(f"{student}: {error}; {_back(base)}, or load the adapter on another base with peft") from None


def replay(
    run_dir: RunDir,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="a:b", help="First and last step, both included (default: all recorded steps).", show_default=False
        ),
    ] = None,
) -> int:
    """Run the learner again on recorded rollouts, and exit with 1 at the first difference."""
    from rich.console import Console

    from sdft.services.cli.replay import replay as run

    difference = run(run_dir, steps, Console(file=lasting_output(), highlight=False))
    print(difference or "no difference: every figure and every saved state is the same bit for bit")
    return 0 if difference is None else 1


def model(
    name: Annotated[str, typer.Argument(help="Name of the model, such as smollm2-135m.", show_default=False)],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder to write, which must be new or empty.", show_default=False)
    ],
) -> None:
    """Write a built-in model as a Hugging Face folder."""
    from sdft.services.planning.models import materialise

    materialise(name, out)
    print(out)
