"""Check that the files that a configuration names exist."""

from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.base.files import existing_file, is_data_file, is_hub_name, resolve_path
from sdft.services.config.run import RunConfig
from sdft.services.config.templates import BUILT_IN_TEMPLATES


def check_files(config: RunConfig, base: Path, sent: Path | None = None) -> None:
    """Raise UserError unless the files that `config` names, relative to the folder `base`, exist.

    sent: for a run on other machines, the folder that is sent to them. Absolute paths outside it are not checked,
    because they are paths on those machines.
    """
    places = [f"stages[{i}]." for i in range(len(config.stages))] or [""]
    for place, task in zip(places, config.tasks, strict=True):
        train, source = task.data.train, task.data.source
        path = resolve_path(base, train)
        if source == "log":
            _check_log(f"{place}data.train", train, base, sent)
        elif source == "file" and (is_data_file(train) or path.exists() or not is_hub_name(train)):
            _check_file(f"{place}data.train", train, base, sent)
            if not is_data_file(train):
                raise UserError(f"{place}data.train: {path} must be a .jsonl or .parquet file")
        for key in task.method.files:
            _check_file(f"{place}method.{key}", getattr(task.method, key), base, sent)
        if task.data.template not in BUILT_IN_TEMPLATES:
            _check_file(f"{place}data.template", task.data.template, base, sent)
    of_stages = [(f"stages[{i}].", stage.sets) for i, stage in enumerate(config.stages)]
    for place, sets in [("evaluation.", config.evaluation.sets), *of_stages]:
        for i, evaluation_set in enumerate(sets):
            _check_file(f"{place}sets[{i}].file", evaluation_set.file, base, sent)


def _check_log(key: str, value: str, base: Path, sent: Path | None) -> None:
    _check_file(key, value, base, sent)
    path = resolve_path(base, value)
    if path.suffix != ".jsonl":
        raise UserError(f"{key}: {path} must be a .jsonl file, because data.source is log")
    if sent is not None and path.resolve().is_relative_to(sent.resolve()):
        raise UserError(
            f"{key}: {path} would be copied to the cluster, and lines that are appended later would not reach the run; "
            f"put the log on storage that the cluster sees, and give its absolute path"
        )


def _check_file(key: str, value: str, base: Path, sent: Path | None) -> None:
    path = Path(value).expanduser()
    if sent is None or not path.is_absolute() or path.is_relative_to(sent):
        existing_file(key, value, base)
