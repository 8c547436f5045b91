"""Absolute paths for the files in a configuration, so that the configuration can move to another folder."""

from collections.abc import Sequence
from pathlib import Path

from sdft.services.algorithms.base import Algorithm
from sdft.services.base.files import resolve_path
from sdft.services.config.data import DataConfig
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.config.run import RunConfig
from sdft.services.config.sections import StageConfig
from sdft.services.config.templates import BUILT_IN_TEMPLATES


def with_absolute_paths(config: RunConfig, base: Path) -> RunConfig:
    """Return the configuration with absolute paths, so that it works from any folder. Missing paths are unchanged."""
    model = _absolute(config.model, base)
    if Path(model).is_dir():  # resolve_model also accepts a folder in the working directory
        model = str(Path(model).resolve())
    teacher = {
        "model": config.teacher.model and _absolute(config.teacher.model, base),
        "models": {name: _absolute(model, base) for name, model in config.teacher.models.items()},
    }
    stages = tuple(stage_with_absolute_paths(stage, base) for stage in config.stages)
    sets = _absolute_sets(config.evaluation.sets, base)
    return config.model_copy(
        update={
            "model": model,
            "teacher": config.teacher.model_copy(update=teacher),
            "method": _absolute_method(config.method, base),
            "data": None if config.data is None else _absolute_data(config.data, base),
            "stages": stages,
            "evaluation": config.evaluation.model_copy(update={"sets": sets}),
        }
    )


def stage_with_absolute_paths(stage: StageConfig, base: Path) -> StageConfig:
    """Return one stage with absolute paths."""
    method = None if stage.method is None else _absolute_method(stage.method, base)
    absolute = {"data": _absolute_data(stage.data, base), "sets": _absolute_sets(stage.sets, base), "method": method}
    return stage.model_copy(update=absolute)


def _absolute(value: str, base: Path) -> str:
    path = resolve_path(base, value)
    return str(path.resolve()) if path.exists() else value


def _absolute_method(method: Algorithm, base: Path) -> Algorithm:
    """Return the algorithm with absolute paths in the settings that it names as files."""
    return method.model_copy(update={key: _absolute(getattr(method, key), base) for key in method.files})


def _absolute_data(data: DataConfig, base: Path) -> DataConfig:
    template = data.template if data.template in BUILT_IN_TEMPLATES else _absolute(data.template, base)
    return data.model_copy(update={"train": _absolute(data.train, base), "template": template})


def _absolute_sets(sets: Sequence[EvaluationSet], base: Path) -> tuple[EvaluationSet, ...]:
    return tuple(s.model_copy(update={"file": _absolute(s.file, base)}) for s in sets)
