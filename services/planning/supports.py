"""Check the supports of the losses: against the tokenizer, the engines, and the memory that scores take."""

from inspect import signature

from sdft.actors.engine import Engine, own_engine
from sdft.actors.roles import STUDENT, TEACHER
from sdft.actors.shared.own_code import is_own
from sdft.actors.shared.process import GIB
from sdft.actors.shared.types import Support
from sdft.services.base.errors import UserError
from sdft.services.config.run import RunConfig, TaskConfig
from sdft.services.planning.memory import scores_bytes

# Scores of a step, above which support full is refused: several processes hold them at a time, so a step moves many
# times as much, and the top 64 of them gives the same results (docs/benchmarks.md).
MOST_GIB = 4.0


def supports(task: TaskConfig) -> list[Support]:
    """Return the supports of a task's losses."""
    return [loss.divergence.scored for loss in task.method.losses]


def width(task: TaskConfig, vocabulary: int) -> int:
    """Return the most tokens that are scored at a position."""
    return max(support.width(vocabulary) for support in supports(task))


def check_supports(config: RunConfig, vocabulary: int) -> None:
    """UserError unless the tokenizer has the tokens of every support, and the scores of a step are of a sensible size.

    vocabulary: number of the tokenizer's tokens.
    """
    for task in config.tasks:
        for support in supports(task):
            most = vocabulary // 2 if support.of == "union" else vocabulary
            if support.k > most:
                of_both = ", and support union has twice as many of each position" if support.of == "union" else ""
                raise UserError(
                    f"method.divergence.top_k is {support.k}{of_both}, and the tokenizer has {vocabulary} tokens; "
                    f"lower it to at most {most}"
                )
            gib = step_gib(task, support, vocabulary)
            if support.of == "full" and gib > MOST_GIB:
                raise UserError(
                    f"method.divergence.support full is {gib:.1f} GiB of scores a step, of {vocabulary} tokens at each "
                    f"position, and at most {MOST_GIB:g} GiB are allowed; set support: teacher with top_k, or lower "
                    f"training.batch_size or sampling.max_new_tokens"
                )


def step_gib(task: TaskConfig, support: Support, vocabulary: int) -> float:
    """Return the GiB of a step's scores, if every completion has its full length."""
    rows = task.training.batch_size * task.sampling.generations * task.longest_reply
    return scores_bytes(rows, support.width(vocabulary)) / GIB


def check_engines_score(config: RunConfig) -> None:
    """UserError unless every engine of a user's own that scores has the methods that the supports need."""
    heat = config.teacher.temperature
    given = next((s.of for task in config.tasks for s in supports(task) if s.of != "teacher"), None)
    scoring = STUDENT if config.teacher_in_use.weights == "live" else TEACHER
    for name, pool in config.actors.pools.items():
        if config.actors.role_name(name) != scoring or not is_own(pool.engine):
            continue
        own = own_engine(pool.engine)
        cold = [f.__name__ for f in (own.score, own.score_at) if "temperature" not in signature(f).parameters]
        if heat != 1 and cold:
            raise UserError(
                f"actors.{name}.engine: {pool.engine} scores without a temperature, and teacher.temperature is "
                f"{heat:g}; take it in {cold[0]}, as sdft.actors.engine.Engine does, or remove teacher.temperature"
            )
        if given is not None and own.score_at is Engine.score_at:
            raise UserError(
                f"actors.{name}.engine: {pool.engine} lacks score_at of sdft.actors.engine.Engine, which "
                f"method.divergence.support {given} needs; add it, or set support: teacher"
            )
