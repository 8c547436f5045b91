"""`sdft eval`: run the evaluation sets of a configuration on a model, without training."""

from rich.console import Console

from sdft.actors.roles import evaluating
from sdft.actors.transport.protocol import Learner
from sdft.services.base.signals import run_until_stopped
from sdft.services.cluster.cluster import places
from sdft.services.evaluation.evaluator import Evaluator
from sdft.services.fleet.factory import engine_pool
from sdft.services.planning.capacity import check_memory
from sdft.services.planning.plan import Plan
from sdft.services.planning.prepared import Prepared
from sdft.services.records.rows import EvalResult, Reply


def evaluate(prepared: Prepared, console: Console) -> tuple[list[EvalResult], list[Reply]]:
    """Return results (of the student and, with demonstrations, of the teacher) and every reply of the student."""
    by_role = {prepared.config.actors.role_name(name): name for name in prepared.plan.pools}
    name = by_role[evaluating(by_role)]
    plan = Plan({name: prepared.plan.pools[name]}, (), card_gib=prepared.plan.card_gib)
    check_memory(prepared.config, plan)
    return run_until_stopped(_run(prepared, plan, name, console))


async def _run(prepared: Prepared, plan: Plan, name: str, console: Console) -> tuple[list[EvalResult], list[Reply]]:
    c = prepared.config
    console.print("starting engines", highlight=False)
    async with places(c.ray, plan) as options:
        # Strict, so that the assignment of questions to engines depends only on the number of engines.
        c = c.model_copy(update={"training": c.training.model_copy(update={"max_staleness": 0})})
        model, ends, vocabulary = prepared.model, prepared.stop_ids, prepared.vocabulary
        pool = engine_pool(c, model, ends, vocabulary, name, options[name], console.print, _no_learner)
        try:
            await pool.start()
            console.print(f"evaluating {prepared.model}", highlight=False, soft_wrap=True)
            evaluator = Evaluator(
                prepared.tokenizer,
                c.evaluation.grading_timeout_s,
                lambda text: console.print(f"  {text}", highlight=False),
            )
            results, replies = await evaluator.students(pool, prepared.sets, 0, 0)
            if c.teacher_in_use.weights != "external":  # else this model is not the teacher
                results += await evaluator.teachers({"": pool}, prepared.sets, 0, 0)
            return results, replies
        finally:
            await pool.stop()


def _no_learner() -> Learner:
    raise RuntimeError("the engines serve the model they were started with")
