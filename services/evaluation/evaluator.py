"""Evaluation on the student engines: questions in, graded replies and accuracies out. Greedy, except for pass@k.

A set of texts has a perplexity instead: exp(mean of -log p) over all tokens except the first of each text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from sdft.actors.shared.drafts import Completion
from sdft.actors.shared.types import GenerateRequest, IntArray, Rollout, Sampling
from sdft.services.base.errors import RunFailed
from sdft.services.data.schedule import seed_of
from sdft.services.data.sets import LoadedSet
from sdft.services.data.thoughts import ReplyText
from sdft.services.environments.player import EpisodePlayer
from sdft.services.fleet.pool import EnginePool
from sdft.services.grading.grade import asked, grade
from sdft.services.grading.pass_at_k import pass_at_k
from sdft.services.records.rows import PASS_AT, PERPLEXITY, STUDENT_ACCURACY, TEACHER_ACCURACY, EvalResult, Reply

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Evaluator:
    """Runs evaluation sets on a pool of engines.

    grading_timeout_s: seconds that a judge may take for one set.
    say(text): called before the questions of a set, which may take minutes, with "tools (teacher): 80 questions".
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", grading_timeout_s: float, say: Callable[[str], None]
    ) -> None:
        self._reply_text = ReplyText(tokenizer)
        self._grading_timeout_s = grading_timeout_s
        self._say = say

    async def students(
        self, pool: EnginePool, sets: Sequence[LoadedSet], step: int, stage: int
    ) -> tuple[list[EvalResult], list[Reply]]:
        """Evaluate every set without demonstrations. Returns the results and all graded replies."""
        results, replies = [], []
        for loaded in sets:
            if loaded.settings.is_text:
                results.append(await self._perplexity(pool, loaded, step, stage))
                continue
            run = self._run if loaded.environment is None else self._play
            result, of_set = await run(pool, loaded, STUDENT_ACCURACY, step, stage)
            results.append(result)
            replies += of_set
            results += await self._pass_at(pool, loaded, STUDENT_ACCURACY, step, stage)
        return results, replies

    async def teachers(
        self,
        pools: Mapping[str, EnginePool],
        sets: Sequence[LoadedSet],
        step: int,
        stage: int,
        external: bool = False,
        skipped: Callable[[str], None] = lambda reason: None,
    ) -> list[EvalResult]:
        """Evaluate the sets that have demonstrations, with these in the prompt: the accuracy to learn from.

        pools: of the teachers, by their routes. external: the engines are another model's, so it is also evaluated
        where it sees the student's prompt. skipped(reason): called for a set whose questions do not name teachers.
        """
        results = []
        for loaded in (loaded for loaded in sets if loaded.has_teacher or (external and loaded.has_prompts)):
            lacking = sum(route not in pools for route in loaded.routes)
            if lacking:
                skipped(
                    f"{_asked(loaded.settings.name, TEACHER_ACCURACY)} is not evaluated: {lacking} of its "
                    f"{len(loaded.routes)} rows have no column teacher"
                )
                continue
            parts = [(pool, loaded.of_route(route)) for route, pool in pools.items() if route in loaded.routes]
            results += _joined([await self._teacher(pool, part, step, stage) for pool, part in parts])
        return results

    async def _teacher(self, pool: EnginePool, loaded: LoadedSet, step: int, stage: int) -> list[EvalResult]:
        run = self._run if loaded.environment is None else self._play
        result, _ = await run(pool, loaded, TEACHER_ACCURACY, step, stage)
        return [result, *await self._pass_at(pool, loaded, TEACHER_ACCURACY, step, stage)]

    async def _pass_at(
        self, pool: EnginePool, loaded: LoadedSet, metric: str, step: int, stage: int
    ) -> list[EvalResult]:
        """Return pass@k for each k of the set, from the same sampled replies.

        The seeds are the same at every step, so that two evaluations differ only by the weights.
        """
        s = loaded.settings
        if not s.pass_at:
            return []
        requests = [
            GenerateRequest(ids, seed_of(f"{s.name}/{question.id}/{i}"))
            for question, ids in zip(loaded.questions, loaded.prompts_of(metric), strict=True)
            for i in range(s.sampled)
        ]
        self._say(f"{_asked(s.name, metric)}: {len(requests)} replies for pass@k")
        rollouts = await pool.generate(requests, Sampling(s.max_new_tokens, s.pass_temperature))
        repeated = [question for question in loaded.questions for _ in range(s.sampled)]
        grades = iter(await grade(s, repeated, list(map(self._text, rollouts)), self._grading_timeout_s))
        right = [sum(next(grades) for _ in range(s.sampled)) for _ in loaded.questions]
        name = PASS_AT if metric == STUDENT_ACCURACY else f"teacher_{PASS_AT}"
        return [
            EvalResult(step, stage, s.name, f"{name}{k}", fmean(pass_at_k(s.sampled, c, k) for c in right), len(right))
            for k in s.pass_at
        ]

    async def _perplexity(self, pool: EnginePool, loaded: LoadedSet, step: int, stage: int) -> EvalResult:
        texts = [p.student_ids for p in loaded.prompts]
        self._say(f"{loaded.settings.name}: {len(texts)} texts")
        scores = await pool.score([(ids[:1], ids[1:]) for ids in texts], 1)
        logprobs = np.concatenate([s.sampled for s in scores]).astype(np.float64)
        return EvalResult(step, stage, loaded.settings.name, PERPLEXITY, float(np.exp(-logprobs.mean())), len(logprobs))

    def _text(self, rollout: Rollout) -> str:
        return self._reply_text(rollout.prompt_ids.tolist(), rollout.completion_ids.tolist())

    async def _run(
        self, pool: EnginePool, loaded: LoadedSet, metric: str, step: int, stage: int
    ) -> tuple[EvalResult, list[Reply]]:
        s = loaded.settings
        requests = [GenerateRequest(ids) for ids in loaded.prompts_of(metric)]
        self._say(f"{_asked(s.name, metric)}: {len(requests)} questions")
        rollouts = await pool.generate(requests, Sampling(s.max_new_tokens, temperature=0.0))
        texts = list(map(self._text, rollouts))
        grades = await grade(s, loaded.questions, texts, self._grading_timeout_s)
        replies = [
            Reply(
                step=step,
                task=s.name,
                id=question.id,
                prompt=asked(question),
                answer=question.answer,
                text=text,
                correct=correct,
                tokens=len(rollout.completion_ids),
                truncated=rollout.finish_reason == "length",
                entropy=-float(rollout.logprobs.mean()) if len(rollout.logprobs) else None,
            )
            for question, rollout, text, correct in zip(loaded.questions, rollouts, texts, grades, strict=True)
        ]
        share = sum(reply.correct for reply in replies) / len(replies)
        return EvalResult(step, stage, s.name, metric, share, len(replies)), replies

    async def _play(
        self, pool: EnginePool, loaded: LoadedSet, metric: str, step: int, stage: int
    ) -> tuple[EvalResult, list[Reply]]:
        """Play an episode for each question, greedily. The environment says whether it has passed."""
        s, environment = loaded.settings, loaded.environment
        assert environment is not None
        self._say(f"{_asked(s.name, metric)}: {len(loaded.questions)} episodes")

        async def complete(prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[tuple[Completion, IntArray]]:
            rollouts = await pool.generate([GenerateRequest(ids) for ids in prompts], Sampling(s.max_new_tokens, 0.0))
            return [(Completion.of(rollout), rollout.completion_ids) for rollout in rollouts]

        player = EpisodePlayer(environment, s.max_new_tokens)
        starts = [(ids, 0, loaded.contexts(i)) for i, ids in enumerate(loaded.prompts_of(metric))]
        played = []
        try:
            for first in range(0, len(starts), environment.concurrent):
                played += await player.play_all(starts[first : first + environment.concurrent], complete)
        finally:
            await player.environments.stop()
        reasons = [reason for episode, reason in played if episode is None]
        if len(reasons) == len(played):
            raise RunFailed(f"{s.name}: every episode was lost: {reasons[0]}")
        if reasons:
            self._say(f"{s.name}: {len(reasons)} episodes were lost, and count as not passed: {reasons[0]}")
        replies = []
        for i, (question, (episode, lost)) in enumerate(zip(loaded.questions, played, strict=True)):
            texts = [] if episode is None else list(map(loaded.contexts(i).reply, episode.ids))
            said = lost if episode is None else episode.feedback or episode.cut
            replies.append(
                Reply(
                    step=step,
                    task=s.name,
                    id=question.id,
                    prompt=asked(question),
                    answer=question.answer,
                    text="\n\n".join([*texts, *([f"[{said}]"] if said else [])]),
                    correct=episode is not None and bool(episode.passed),
                    tokens=0 if episode is None else sum(map(len, episode.ids)),
                    truncated=episode is not None and episode.completions[-1].finish_reason == "length",
                    turns=len(texts),
                )
            )
        share = sum(reply.correct for reply in replies) / len(replies)
        return EvalResult(step, stage, s.name, metric, share, len(replies)), replies


def _joined(parts: Sequence[list[EvalResult]]) -> list[EvalResult]:
    """Return the results of a set from those of its parts: means over all questions."""
    if len(parts) == 1:
        return parts[0]
    joined = []
    for same in zip(*parts, strict=True):
        n = sum(result.n for result in same)
        joined.append(replace(same[0], value=sum(result.value * result.n for result in same) / n, n=n))
    return joined


def _asked(name: str, metric: str) -> str:
    return name if metric == STUDENT_ACCURACY else f"{name} (teacher)"
