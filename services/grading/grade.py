"""Replies to an evaluation set's questions, graded: by a program, or by a judge."""

from collections.abc import Callable, Sequence
from typing import Any

from sdft.actors.shared.waiting import within
from sdft.services.config.sections import EvaluationSet
from sdft.services.data.demonstrations import Record
from sdft.services.data.thoughts import without_thoughts
from sdft.services.grading.graders import GRADERS
from sdft.services.grading.judge import judged


async def grade(
    settings: EvaluationSet, questions: Sequence[Record], replies: Sequence[str], limit_s: float
) -> list[bool]:
    """Whether each reply to the question in its place is right. limit_s: of a judge, for all of them.

    Graders and judges see the reply without its reasoning, which is no part of the answer. A judge is asked of no empty
    answer: it is wrong.
    """
    answers = [without_thoughts(reply) for reply in replies]
    pairs = list(zip(questions, answers, strict=True))
    if settings.judge is not None:
        items = [(asked(q), str(q.answer), answer) for q, answer in pairs if answer.strip()]
        what = f"the judge {settings.judge.model} to grade {len(items)} replies"
        verdicts = iter(await within(judged(settings.judge, items), limit_s, what))
        return [bool(answer.strip()) and next(verdicts) for answer in answers]
    grader = GRADERS[settings.grader]
    return [grader.grade(answer, q.answer) for q, answer in pairs]


def asked(question: Record) -> str:
    """A question as people read it: the message, or all of them with who speaks."""
    if len(question.messages) == 1:
        return question.messages[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in question.messages)


def answer_check(settings: EvaluationSet) -> Callable[[Any], str | None]:
    """What tells whether a row's answer can be used: None, or the reason why not."""
    if settings.is_text:
        return lambda answer: None
    if settings.judge is not None:
        return lambda answer: None if isinstance(answer, str) and answer.strip() else "answer must be text for a judge"
    return GRADERS[settings.grader].check_answer
