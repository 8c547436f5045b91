"""`sdft train CONFIG --append STAGE.yaml`: add a stage to a run that is finished or interrupted.

    the run's own config.yaml + STAGE.yaml ─► a configuration with one stage more ─► resume from the last step

The same command after an interruption adds nothing.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from sdft.services.base.errors import UserError
from sdft.services.config.load import load_config, load_stage
from sdft.services.config.paths import stage_with_absolute_paths, with_absolute_paths
from sdft.services.config.run import RunConfig
from sdft.services.config.sections import StageConfig, TrainingConfig


def appended(run_dir: Path, base: Path, overrides: Sequence[str], stage_file: Path) -> RunConfig:
    """Return the configuration of the run in `run_dir` with the stage in `stage_file` added as the last one.

    base: the folder that relative paths in the overrides start from. Raises UserError if there is no run in `run_dir`,
    if another stage has the same name, or if the result is invalid.
    """
    run_config = run_dir / "config.yaml"
    if not run_config.exists():
        raise UserError(
            f"--append {stage_file}: there is no run in {run_dir} yet; put the stage into the configuration's stages"
        )
    name = stage_name(run_dir)
    stages = load_config(run_config).stages
    if stages and stages[0].name == name:  # an earlier --append made it a stage
        overrides = [_of_stage(stages[0], override) for override in overrides]
    config = as_stream(with_absolute_paths(load_config(run_config, overrides), base), name)
    stage = stage_with_absolute_paths(load_stage(stage_file, config), stage_file.parent)
    namesake = next((s for s in config.stages if s.name == stage.name), None)
    if namesake == stage:
        return config
    if namesake is not None:
        raise UserError(f"{stage_file}: {run_dir} already has another stage named {stage.name}; rename the new stage")
    try:
        return RunConfig.model_validate(config.model_dump() | {"stages": (*config.stages, stage)})
    except ValidationError as error:  # valid alone, but not after the run's other stages
        raise UserError(f"{stage_file}: {error.errors()[0]['ctx']['error']}") from None


def stage_name(run_dir: Path) -> str:
    """Return the stage name for a run's only task: the name of its run directory, in lower case."""
    return re.sub(r"[^a-z0-9_-]+", "-", run_dir.resolve().name.lower())


def _of_stage(stage: StageConfig, override: str) -> str:
    """Rewrite an override of a run's only task as one of the stage made from it. Other overrides are unchanged."""
    key = override.partition("=")[0].strip()
    if key in ("training.epochs", "training.steps"):
        return f"stages.{stage.name}.{override.strip().removeprefix('training.')}"
    if any(key.startswith(f"evaluation.sets.{s.name}.") for s in stage.sets):
        return f"stages.{stage.name}.{override.strip().removeprefix('evaluation.')}"
    return f"stages.{stage.name}.{override.strip()}" if key.split(".")[0] == "data" else override


def as_stream(config: RunConfig, name: str) -> RunConfig:
    """Return the same run as a stream of one stage named `name`. A run with stages is returned unchanged."""
    if config.data is None:
        return config
    training = config.training
    sets = config.evaluation.sets
    first = StageConfig(
        name=name,
        data=config.data,
        epochs=training.epochs,
        steps=training.steps,
        sets=tuple(s for s in sets if s.role == "task"),
    )
    kept = config.evaluation.model_copy(update={"sets": tuple(s for s in sets if s.role == "retention")})
    rest = TrainingConfig(batch_size=training.batch_size, max_staleness=training.max_staleness)
    return config.model_copy(update={"data": None, "stages": (first,), "training": rest, "evaluation": kept})
