"""The files that a configuration names: whether they are there, and their paths for a configuration that moves."""

from collections.abc import Sequence
from pathlib import Path

from services.config import RunConfig
from services.errors import UserError
from services.files import existing_file, is_data_file, is_hub_name, resolve_path
from services.prompts import BUILT_IN_TEMPLATES
from services.sections import DataConfig, EvaluationSet, StageConfig


def with_absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """The same configuration for a file in any other folder, used in any other: no path in it is relative."""
    model = _absolute(config.model, base)
    if Path(model).is_dir():  # resolve_model takes a folder of the working directory too
        model = str(Path(model).resolve())
    stages = tuple(stage_with_absolute_paths(stage, base) for stage in config.stages)
    sets = _absolute_sets(config.evaluation.sets, base)
    return config.model_copy(
        update={
            "model": model,
            "data": None if config.data is None else _absolute_data(config.data, base),
            "stages": stages,
            "evaluation": config.evaluation.model_copy(update={"sets": sets}),
        }
    )


def stage_with_absolute_paths(stage: StageConfig, base: Path) -> StageConfig:
    """The same for a stage alone."""
    return stage.model_copy(update={"data": _absolute_data(stage.data, base), "sets": _absolute_sets(stage.sets, base)})


def _absolute(value: str, base: Path) -> str:
    path = resolve_path(base, value)
    return str(path.resolve()) if path.exists() else value


def _absolute_data(data: DataConfig, base: Path) -> DataConfig:
    template = data.template if data.template in BUILT_IN_TEMPLATES else _absolute(data.template, base)
    return data.model_copy(update={"train": _absolute(data.train, base), "template": template})


def _absolute_sets(sets: Sequence[EvaluationSet], base: Path) -> tuple[EvaluationSet, ...]:
    return tuple(s.model_copy(update={"file": _absolute(s.file, base)}) for s in sets)


def check_files(config: RunConfig, base: Path, sent: Path | None = None) -> None:
    """Raise UserError unless the files that `config` names, relative to the folder `base`, are there.

    sent: of a run on other machines the folder that they get; absolute paths that lead elsewhere are theirs.
    """
    places = [f"stages[{i}]." for i in range(len(config.stages))] or [""]
    for place, task in zip(places, config.tasks, strict=True):
        train = task.data.train
        path = resolve_path(base, train)
        if is_data_file(train) or path.exists() or not is_hub_name(train):
            _check_file(f"{place}data.train", train, base, sent)
            if not is_data_file(train):
                raise UserError(f"{place}data.train: {path} must be a .jsonl or .parquet file")
        if task.data.template not in BUILT_IN_TEMPLATES:
            _check_file(f"{place}data.template", task.data.template, base, sent)
    own = [("evaluation.", config.evaluation.sets), *((f"stages[{i}].", s.sets) for i, s in enumerate(config.stages))]
    for place, sets in own:
        for i, one in enumerate(sets):
            _check_file(f"{place}sets[{i}].file", one.file, base, sent)


def _check_file(key: str, value: str, base: Path, sent: Path | None) -> None:
    path = Path(value).expanduser()
    if sent is None or not path.is_absolute() or path.is_relative_to(sent):
        existing_file(key, value, base)
