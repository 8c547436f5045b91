"""The file of an evaluation: the results, then every question with its reply and grade, one JSON object per line.

`sdft eval --out` writes it. `sdft eval --regrade` grades its replies again with the graders and answers of the current
configuration, and starts no model.
"""

import asyncio
import json
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path

from sdft.services.base.errors import UserError
from sdft.services.base.files import read_text, write_atomically
from sdft.services.config.run import RunConfig
from sdft.services.data.demonstrations import Record, load_questions
from sdft.services.grading.grade import answer_check, grade
from sdft.services.grading.judge import check_judge
from sdft.services.records.rows import STUDENT, EvalResult, Sample

FIELDS = {f.name for f in fields(Sample)}


def write_answers(path: Path, results: list[EvalResult], samples: list[Sample]) -> None:
    """Write results and replies to the file, or replace it, atomically."""
    rows = [asdict(r) for r in results] + [asdict(s) for s in samples]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def regrade(config: RunConfig, base: Path, path: Path) -> tuple[list[EvalResult], list[Sample]]:
    """Grade the replies of a file again; return results and replies.

    UserError if the question of a reply is not in the configuration's sets, or if the replies are from several steps.
    """
    whole = [s.model_copy(update={"rows": None}) for s in config.sets if not s.is_text]  # the file may have other rows
    sets = {s.name: (s, {q.id: q for q in load_questions(s, base, answer_check(s))}) for s in whole}
    by_set: dict[str, list[tuple[Sample, Record]]] = {}
    for sample in _read(path):
        if sample.task not in sets:
            raise UserError(
                f"{path}: answers to the set {sample.task}, which the configuration does not have; it has "
                f"{', '.join(sets)}"
            )
        _, questions = sets[sample.task]
        if sample.id not in questions:
            raise UserError(f"{path}: an answer to question {sample.id} of {sample.task}, which its file does not have")
        by_set.setdefault(sample.task, []).append((sample, questions[sample.id]))
    samples = []
    for task in by_set:
        judge = sets[task][0].judge
        if judge is not None:
            check_judge(task, judge)
    for task, pairs in by_set.items():
        asked, replies = [q for _, q in pairs], [s.text for s, _ in pairs]
        right_ones = asyncio.run(grade(sets[task][0], asked, replies, config.evaluation.timeout_s))
        samples += [
            replace(s, answer=q.answer, correct=is_right) for (s, q), is_right in zip(pairs, right_ones, strict=True)
        ]
    counts = Counter(s.task for s in samples)
    right = Counter(s.task for s in samples if s.correct)
    step = samples[0].step
    return [EvalResult(step, 0, task, STUDENT, right[task] / n, n) for task, n in counts.items()], samples


def _read(path: Path) -> list[Sample]:
    """Return the replies in a file, without the results. UserError if there are none, or from several steps."""
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}); give a file that `sdft eval --out` wrote") from None
        if isinstance(row, dict) and "metric" in row:
            continue
        if not isinstance(row, dict) or set(row) != FIELDS:
            raise UserError(f"{path}:{number}: not an answer; give a file that `sdft eval --out` wrote")
        samples.append(Sample(**row))
    if not samples:
        raise UserError(f"{path}: there are no answers in it; give a file that `sdft eval --out` wrote")
    steps = dict.fromkeys(s.step for s in samples)
    if len(steps) > 1:  # as in a run's samples.jsonl; an accuracy over several models means nothing
        listed = ", ".join(map(str, steps))
        raise UserError(f"{path}: answers of several steps ({listed}); give a file with those of one")
    return samples
