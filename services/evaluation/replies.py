"""The file of an evaluation: the results, then every question with its reply and grade, one JSON object per line.

`sdft eval --out` writes it. `sdft eval --regrade` grades its replies again with the graders and answers of the current
configuration, and starts no model.
"""

import asyncio
import json
from collections import Counter
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.base.files import read_text, write_atomically
from sdft.services.config.run import RunConfig
from sdft.services.data.demonstrations import Record, load_questions
from sdft.services.grading.grade import answer_check, grade
from sdft.services.grading.judge import check_judge
from sdft.services.records.rows import STUDENT_ACCURACY, EvalResult, Reply

FIELDS = {f.name for f in fields(Reply)}
NEEDED = {f.name for f in fields(Reply) if f.default is MISSING}


def write_replies(path: Path, results: list[EvalResult], replies: list[Reply]) -> None:
    """Write results and replies to the file, or replace it, atomically."""
    rows = [asdict(r) for r in results] + [asdict(reply) for reply in replies]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def regrade(config: RunConfig, base: Path, path: Path) -> tuple[list[EvalResult], list[Reply]]:
    """Grade the replies of a file again; return results and replies.

    UserError if the question of a reply is not in the configuration's sets, or if the replies are from several steps.
    """
    whole = [s.model_copy(update={"rows": None}) for s in config.sets if not s.is_text]  # the file may have other rows
    sets = {s.name: (s, {q.id: q for q in load_questions(s, base, answer_check(s))}) for s in whole}
    by_set: dict[str, list[tuple[Reply, Record]]] = {}
    for reply in _read(path):
        if reply.task not in sets:
            raise UserError(
                f"{path}: it has replies to the set {reply.task}, which the configuration does not have (it has "
                f"{', '.join(sets)}); add the set, or remove these replies"
            )
        _, questions = sets[reply.task]
        if reply.id not in questions:
            raise UserError(
                f"{path}: it has a reply to question {reply.id} of {reply.task}, which is not in the set's file; "
                f"restore the question, or remove the reply"
            )
        by_set.setdefault(reply.task, []).append((reply, questions[reply.id]))
    replies = []
    for task in by_set:
        if sets[task][0].grader == "environment":
            raise UserError(
                f"{path}: the set {task} is graded by its environment while the episodes are played; remove its replies"
            )
        judge = sets[task][0].judge
        if judge is not None:
            check_judge(task, judge)
    for task, pairs in by_set.items():
        asked, texts = [q for _, q in pairs], [reply.text for reply, _ in pairs]
        grades = asyncio.run(grade(sets[task][0], asked, texts, config.evaluation.grading_timeout_s))
        replies += [
            replace(reply, answer=q.answer, correct=correct) for (reply, q), correct in zip(pairs, grades, strict=True)
        ]
    counts = Counter(r.task for r in replies)
    right = Counter(r.task for r in replies if r.correct)
    step = replies[0].step
    return [EvalResult(step, 0, task, STUDENT_ACCURACY, right[task] / n, n) for task, n in counts.items()], replies


def _read(path: Path) -> list[Reply]:
    """Return the replies in a file, without the results. UserError if there are none, or from several steps."""
    replies = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); give a file that `sdft eval --out` wrote") from None
        if isinstance(row, dict) and "metric" in row:
            continue
        if not isinstance(row, dict) or not NEEDED <= set(row) <= FIELDS:
            raise UserError(f"{path}:{number}: not a reply; give a file that `sdft eval --out` wrote")
        replies.append(Reply(**row))
    if not replies:
        raise UserError(f"{path}: the file has no replies; give a file that `sdft eval --out` wrote")
    steps = dict.fromkeys(r.step for r in replies)
    if len(steps) > 1:  # as in a run's samples.jsonl; an accuracy over several models means nothing
        listed = ", ".join(map(str, steps))
        raise UserError(
            f"{path}: the replies are of several steps ({listed}); give a file with the replies of one step"
        )
    return replies
