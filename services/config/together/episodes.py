"""Environments, and the methods and evaluation sets that take episodes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig


def check(run: "RunConfig") -> None:
    """Raise ValueError, with the mend, unless methods and sets have the environments that they need."""
    for each in (_methods, _sets):
        each(run)


def _methods(run: "RunConfig") -> None:
    """Of the methods."""
    for place, task in zip(run.places, run.tasks, strict=True):
        environment, method, n = task.environment, task.method, task.sampling.generations
        if n < method.least_generations:
            raise ValueError(
                f"{place}sampling.generations {n} leaves method {method.type} nothing to learn from; set it to "
                f"{method.least_generations} or more"
            )
        if method.needs_success and (environment is None) == (method.graded_by is None):
            mend = "set method.grader, or environment" if environment is None else "remove method.grader"
            raise ValueError(f"{place}method {method.type}: one of them says what has passed; {mend}")
        if method.needs_success and task.data.template in ("context", "feedback", "none"):
            raise ValueError(
                f"{place}method {method.type} shows the teacher a sample as the demonstration, and data.template "
                f"{task.data.template} shows none; set data.template: turn or paper"
            )
        if method.shows_feedback and environment is None:
            raise ValueError(f"{place}method {method.type}: feedback is of an environment; set environment")
        if method.shows_feedback and task.data.fallback_template != "feedback":
            raise ValueError(
                f"{place}method {method.type}: no template shows feedback; set data.fallback_template: feedback"
            )
        if environment is None:
            continue
        if not method.plays:
            raise ValueError(
                f"{place}environment: method {method.type} takes single replies; use method sdft, or remove environment"
            )
        if environment.max_tokens <= task.sampling.max_new_tokens:
            raise ValueError(
                f"{place}environment.max_tokens {environment.max_tokens} must be more than "
                f"{place}sampling.max_new_tokens {task.sampling.max_new_tokens}; raise it"
            )
        least = run.training.batch_size * task.sampling.generations if run.strict else task.sampling.generations
        if environment.concurrent < least:
            raise ValueError(
                f"{place}environment.concurrent {environment.concurrent} is less than the {least} episodes that "
                f"begin together; raise it"
            )


def _sets(run: "RunConfig") -> None:
    """Of the evaluation sets."""
    own = [(s, run.environment) for s in run.evaluation.sets]
    own += [(s, stage.environment or run.environment) for stage in run.stages for s in stage.sets]
    for s, environment in own:
        if s.grader == "environment" and s.environment is None and environment is None:
            raise ValueError(
                f"evaluation set {s.name}: grader environment needs an environment; set it in the set, or in the run"
            )
        played = (s.environment or environment) if s.grader == "environment" else None
        if played is not None and played.max_tokens <= s.max_new_tokens:
            raise ValueError(
                f"evaluation set {s.name}: max_new_tokens {s.max_new_tokens} leaves no room for a second reply in "
                f"environment.max_tokens {played.max_tokens}; lower it"
            )
