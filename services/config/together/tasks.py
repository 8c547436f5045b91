"""The tasks of a run: its stages, or the run itself."""

from typing import TYPE_CHECKING

from sdft.actors.roles import teacher_pool
from sdft.services.config.data import check_length

if TYPE_CHECKING:
    from sdft.services.config.run import RunConfig


def check(run: "RunConfig") -> None:
    """Raise ValueError, with the mend, unless each task has data, an end and something to learn."""
    for each in (_one_task_or_stages, _pools_of_teachers, _one_clip, _a_cosine_has_an_end, _something_to_learn):
        each(run)


def _one_task_or_stages(run: "RunConfig") -> None:
    """Data and length stand in the run or in its stages, and names are unique."""
    t = run.training
    if run.stages and (run.data is not None or t.epochs is not None or t.steps is not None):
        key = "data" if run.data is not None else "training.epochs or training.steps"
        raise ValueError(f"a run with stages must not set {key}; set it in each stage instead")
    if not run.stages and run.data is None:
        raise ValueError("data is required but missing; set data.train to the file of demonstrations")
    if run.data is not None:
        try:
            check_length(run.data, t.epochs, t.steps)
        except ValueError as error:
            raise ValueError(f"training: {error}") from None
    names_of = {"stages": [s.name for s in run.stages], "evaluation sets": [s.name for s in run.sets]}
    for plural, names in names_of.items():
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two {plural} have the same name, {twice}; rename one")


def _pools_of_teachers(run: "RunConfig") -> None:
    """No pool has the name of a teacher's."""
    taken = next((pool for pool in map(teacher_pool, run.teacher.models) if pool in run.actors.pools), None)
    if taken is not None:
        raise ValueError(
            f"actors.{taken} has the name that the pool of a teacher in teacher.models gets; rename the pool, or "
            f"the teacher"
        )


def _one_clip(run: "RunConfig") -> None:
    """The run has one clip of the gradient."""
    clip = run.learner.optimizer.grad_clip
    for i, stage in enumerate(run.stages):
        if stage.optimizer is not None and stage.optimizer.grad_clip != clip:
            raise ValueError(
                f"stages[{i}].optimizer.grad_clip {stage.optimizer.grad_clip:g} must equal "
                f"learner.optimizer.grad_clip {clip:g}: the whole run has one value; change one of them"
            )


def _a_cosine_has_an_end(run: "RunConfig") -> None:
    """A cosine needs the number of steps."""
    places = [(f"stages[{i}].", "steps") for i in range(len(run.stages))] or [("", "training.steps")]
    for (place, key), task in zip(places, run.tasks, strict=True):
        unbounded = task.training.epochs is None and task.training.steps is None
        if unbounded and task.learner.optimizer.schedule == "cosine":
            raise ValueError(
                f"{place}{key} is missing, so that the learning rate's cosine has no end; set it, or set "
                f"learner.optimizer.schedule: constant"
            )


def _something_to_learn(run: "RunConfig") -> None:
    """Some tokens are in the loss, and the method gets the teacher that it needs."""
    for place, task in zip(run.places, run.tasks, strict=True):
        longest, skipped = task.sampling.max_new_tokens, task.method.skipped
        if longest <= skipped:
            raise ValueError(
                f"{place}sampling.max_new_tokens {longest} must be more than {place}method.skip_first {skipped}, "
                f"or no token is in the loss; raise max_new_tokens, or lower skip_first"
            )
        target = next((loss.length for loss in task.method.losses if loss.length is not None), None)
        if target is not None and target >= task.longest_reply:
            raise ValueError(
                f"{place}method.length {target} has no effect: no completion is longer than {task.longest_reply} "
                f"tokens; lower it, or remove it"
            )
        if task.method.recalled is not None and task.data.grows:
            raise ValueError(
                f"{place}method {task.method.type} trains its prompts in each epoch, and a source that grows has "
                f"none; set {place}data.source: file, or choose another method"
            )
        weights = task.method.teacher_weights
        if weights and run.teacher.weights not in weights:
            raise ValueError(
                f"{place}method {task.method.type} needs teacher.weights: {' or '.join(weights)}, not "
                f"{run.teacher.weights}; change one of them"
            )
