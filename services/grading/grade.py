"""Grade replies to the questions of an evaluation set, by a rule or by a judge."""

from collections.abc import Callable, Sequence
from typing import Any

from sdft.actors.shared.waiting import within
from sdft.services.config.evaluation import EvaluationSet
from sdft.services.data.demonstrations import Record
from sdft.services.data.messages import said
from sdft.services.data.thoughts import without_thoughts
from sdft.services.grading.graders import GRADERS
from sdft.services.grading.judge import judged


async def grade(
    settings: EvaluationSet, questions: Sequence[Record], replies: Sequence[str], limit_s: float
) -> list[bool]:
    """Return for each reply whether it is right; replies and questions are in the same order.

    limit_s: seconds that a judge may take for all replies together. Reasoning is removed from a reply before grading.
    An empty reply is wrong and is not sent to a judge.
    """
    answers = [without_thoughts(reply) for reply in replies]
    pairs = list(zip(questions, answers, strict=True))
    if settings.judge is not None:
        items = [(asked(q), str(q.answer), answer) for q, answer in pairs if answer.strip()]
        work = f"the judge {settings.judge.model} to grade {len(items)} replies"
        verdicts = iter(await within(judged(settings.judge, items), limit_s, work))
        return [bool(answer.strip()) and next(verdicts) for answer in answers]
    grader = GRADERS[settings.grader]
    return [grader.grade(answer, q.answer) for q, answer in pairs]


def asked(question: Record) -> str:
    """Format a question for a judge: the message, or all messages with their roles."""
    if len(question.messages) == 1:
        return question.messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {said(m)}" for m in question.messages)


def answer_check(settings: EvaluationSet) -> Callable[[Any], str | None]:
    """Return the check of a row's answer; the check returns None, or the reason why the answer cannot be used."""
    if settings.is_text or settings.grader == "environment":
        return lambda answer: None
    if settings.judge is not None:
        return lambda answer: None if isinstance(answer, str) and answer.strip() else "answer must be text for a judge"
    return GRADERS[settings.grader].check_answer
