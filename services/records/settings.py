"""The resolved configuration in a run directory, not validated, so that runs of other versions stay readable."""

from pathlib import Path
from typing import Any

from sdft.actors.roles import STUDENT, TEACHER
from sdft.services.algorithms.base import Algorithm
from sdft.services.algorithms.registry import ALGORITHMS
from sdft.services.base.errors import UserError
from sdft.services.config.yaml import YamlError, parse_yaml


def read_config(run_dir: Path) -> dict[str, Any]:
    """Return the resolved configuration, {} before it is written. Raises UserError if it is not YAML."""
    path = run_dir / "config.yaml"
    try:
        config = parse_yaml(path.read_text()) if path.exists() else {}
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: not YAML ({error}); restore the file that the run wrote") from error
    return config if isinstance(config, dict) else {}


def max_staleness(config: dict[str, Any]) -> int:
    """Return training.max_staleness, by default 0."""
    return int((config.get("training") or {}).get("max_staleness") or 0)


def method_of(config: dict[str, Any], stage: int) -> str:
    """Return the name of a stage's algorithm (stages are counted from 0), by default that of the run."""
    stages = config.get("stages") or []
    of_stage = stages[stage].get("method") if stage < len(stages) else None
    method = of_stage or config.get("method") or "sdft"
    return str(method.get("type", "sdft") if isinstance(method, dict) else method)


def teacher_weights(config: dict[str, Any]) -> str:
    """Return teacher.weights, by default ema."""
    return str((config.get("teacher") or {}).get("weights") or "ema")


def sampler_and_scorer(config: dict[str, Any], stage: int) -> tuple[str, str] | None:
    """Return the roles whose engines sample and score in a stage; None if no engine does either."""
    method = ALGORITHMS.get(method_of(config, stage), Algorithm)
    if not method.teacher_scores:
        return None
    scorer = STUDENT if teacher_weights(config) == "live" else TEACHER
    return (STUDENT if method.student_samples else scorer), scorer
