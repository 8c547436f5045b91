"""The protocol of an algorithm: it makes the training sequences of a record, with the engines of the run.

    Group (a record and its samples) ─► make ─┬─► student.complete(prompts)             completions of the student
                                              ├─► teacher.complete(prompts)             completions of the teacher
                                              ├─► teacher.score(prompts, completions)   the teacher's log-probs of them
                                              └─► drafts of training sequences, usually one per sample

Tokens and log-probs stay where they were made, and a draft refers to them. `student.tokens` fetches tokens.

An algorithm is also the section `method` of the configuration: its fields are its settings. It holds no state.
In a strict run the calls of all groups of a batch are joined into one call of the engines.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field

from sdft.actors.shared.drafts import Completion, Draft, Scores, Turn, given
from sdft.actors.shared.sequences import BoolArray
from sdft.actors.shared.types import IntArray, Rollout, SampleId, Support
from sdft.learner.config import Divergence, Forward, ImportanceConfig, LossConfig
from sdft.services.base.section import Section, short_form


class Contexts(Protocol):
    """Builds texts and token ids of a record while the run goes on."""

    def teacher(self, **columns: Any) -> IntArray:
        """Return the teacher's prompt [P], with these values in place of the record's columns: `demonstration=...`.

        A demonstration is a text, a message or several; None takes a column away.

        A column that data.template does not show has no effect. Raises UserError if the prompt is longer than
        data.max_teacher_prompt_tokens, or if the column that the template shows is missing.
        """

    def text(self, ids: IntArray) -> str:
        """Return the text of a completion [T], without the token that ends it."""

    def reply(self, ids: IntArray) -> str:
        """Return a completion [T] as an environment or a grader reads it: with marks, without its last token."""

    def between(self, messages: Sequence[Mapping[str, Any]]) -> IntArray:
        """Return the tokens [C] between the end of a reply and the next one, with these messages there.

        Raises UserError if the chat template does not show them.
        """

    @property
    def row(self) -> Mapping[str, Any]:
        """The columns of the record, for an environment."""


@dataclass(frozen=True, slots=True)
class Episode:
    """The replies of one sample, and what came before each. Without an environment there is one reply."""

    contexts: tuple[IntArray, ...]  # [C] before each completion, since the one before; first the student's prompt
    completions: tuple[Completion, ...]
    ids: tuple[IntArray, ...] = ()  # [T], tokens of each completion; none if there is one completion
    passed: bool | None = None  # None: no environment says
    feedback: str = ""  # of the environment
    cut: str = ""  # why it ended before the environment said so
    messages: tuple[Mapping[str, Any], ...] = ()  # replies and what answered them; none if no environment did

    @property
    def behind_the_prompt(self) -> IntArray:
        """All tokens [T] behind the student's prompt."""
        parts = [self.ids[0]]
        for context, ids in zip(self.contexts[1:], self.ids[1:], strict=True):
            parts += [context, ids]
        return np.concatenate(parts)


class Player(Protocol):
    """Plays episodes with the environment of a stage."""

    async def play(self, group: "Group", student: "Student") -> "list[Episode | None]":
        """Return an episode for each sample of a group; None if it was lost."""


class Group(NamedTuple):
    """One record of a batch and the samples that are made of it. Samples of one group may use each other.

    `group._replace(student_ids=...)` returns a changed one.
    """

    step: int  # the optimizer step that trains on it
    samples: tuple[SampleId, ...]  # one per generation
    seeds: tuple[int, ...]  # sampling seed of each sample
    student_ids: IntArray  # [P], the student's prompt
    teacher_ids: IntArray | None  # the teacher's prompt; None: the record lacks the column that the template shows
    demonstration_ids: IntArray | None  # [T], the demonstration as a reply; None unless the algorithm trains it
    contexts: Contexts
    demonstration_mask: BoolArray | None = None  # [T], which of its tokens the assistant writes; None: all
    player: Player | None = None  # None: the stage has no environment
    grade: Callable[[str], bool] | None = None  # whether a reply is right, by the algorithm's `graded_by`
    route: str = ""  # name of the record's teacher in teacher.models, whose engines `make` gets; "": no such name

    async def episodes(self, student: "Student") -> list[Episode | None]:
        """Return an episode for each sample; None if it was lost."""
        if self.player is not None:
            return await self.player.play(self, student)
        completions = await student.complete([self.student_ids] * len(self.samples), self.seeds)
        return [Episode((self.student_ids,), (completion,)) for completion in completions]

    async def scored(
        self,
        teacher: "Teacher",
        episodes: Sequence[Episode | None],
        support: Support,
        skip_first: int,
        prompts: Sequence[IntArray | None] | None = None,
    ) -> list[Draft]:
        """Have the teacher score episodes, each in one pass over all its turns. Returns a draft of each.

        support: the tokens whose log-probs it gives. prompts: the teacher's prompt [P] for each episode; without one an
        episode is left out. None: teacher_prompt.
        """
        behind = [self.teacher_prompt] * len(episodes) if prompts is None else prompts
        played = [
            (i, episode, prompt)
            for i, (episode, prompt) in enumerate(zip(episodes, behind, strict=True))
            if episode is not None and prompt is not None
        ]
        if not played:
            return []
        whole = [
            e.completions[0] if len(e.completions) == 1 else await self._whole(teacher, e, support)
            for _, e, _ in played
        ]
        scores = await teacher.score([prompt for _, _, prompt in played], whole, support)
        return [
            Draft(self.samples[i], self.seeds[i], _turns(episode, of_episode), skip_first)
            for (i, episode, _), of_episode in zip(played, scores, strict=True)
        ]

    async def _whole(self, teacher: "Teacher", episode: Episode, support: Support) -> Completion:
        """Return all tokens behind the student's prompt as one completion, with the student's most likely ones."""
        if not support.likely:
            return given(self.step, episode.behind_the_prompt)
        parts: list[IntArray] = []
        for context, rollout in zip(episode.contexts, await teacher.rollouts(episode.completions), strict=True):
            if rollout.likely is None:
                return given(self.step, episode.behind_the_prompt)  # the scoring says what is missing
            if parts:  # between two replies: not in the loss, so any distinct tokens do
                parts.append(np.tile(np.arange(support.likely, dtype=np.int32), (len(context), 1)))
            parts.append(rollout.likely)
        return given(self.step, episode.behind_the_prompt, np.concatenate(parts))

    @property
    def teacher_prompt(self) -> IntArray:
        """The teacher's prompt [P]. Rows of an algorithm that scores and does not train demonstrations have one."""
        if self.teacher_ids is None:
            raise ValueError(f"sample {self.samples[0]}: the row lacks the column that data.template shows the teacher")
        return self.teacher_ids

    def drafts(
        self, completions: Sequence[Completion], scores: Sequence[Scores], skip_first: int, objective: int = 0
    ) -> list[Draft]:
        """Return a draft of one turn for each sample: its completion behind the student's prompt, and its scores."""
        return [
            Draft(sample, seed, (Turn(self.student_ids, completion, score),), skip_first, objective)
            for sample, seed, completion, score in zip(self.samples, self.seeds, completions, scores, strict=True)
        ]

    def demonstrated(self) -> list[Draft]:
        """Return a draft for each sample: the demonstration as its completion. Needs `trains_demonstrations`."""
        if self.demonstration_ids is None:
            raise ValueError(f"sample {self.samples[0]}: the row has no demonstration")
        turn = Turn(self.student_ids, given(self.step, self.demonstration_ids), mask=self.demonstration_mask)
        return [Draft(sample, seed, (turn,)) for sample, seed in zip(self.samples, self.seeds, strict=True)]


def _turns(episode: Episode, scores: Scores) -> tuple[Turn, ...]:
    """Return the turns of an episode. scores: of all tokens behind the prompt."""
    turns, first = [], 0
    for i, (context, completion) in enumerate(zip(episode.contexts, episode.completions, strict=True)):
        first += len(context) if i else 0
        turns.append(Turn(context, completion, scores._replace(first=first)))
        first += completion.tokens
    return tuple(turns)


class Student(Protocol):
    """The student engines."""

    async def complete(self, prompts: Sequence[IntArray], seeds: Sequence[int]) -> list[Completion]:
        """Return one completion per prompt, sampled with the settings in `sampling`."""

    async def tokens(self, completions: Sequence[Completion]) -> list[IntArray]:
        """Fetch the tokens [T] of completions, for algorithms that look at them."""

    async def rollouts(self, completions: Sequence[Completion]) -> list[Rollout]:
        """Fetch the rollouts of completions."""


class Teacher(Student, Protocol):
    """The teacher engines, with the weights that teacher.weights names."""

    async def score(
        self, prompts: Sequence[IntArray], completions: Sequence[Completion], support: Support
    ) -> list[Scores]:
        """Return the teacher's log-probs at each token of each completion, behind these prompts.

        support: of which tokens; that of a divergence is `divergence.scored`.
        """


Make = TypeVar("Make", bound=Callable[..., Any])


def awaits_engines_only(make: Make) -> Make:
    """Mark a `make` that, without an environment, awaits nothing but complete and score of the engines.

    A strict batch then needs no task for each of its groups. The mark is of the function, so that a subclass with a
    `make` of its own does not inherit it.
    """
    setattr(make, "engines_only", True)  # noqa: B010  (mypy knows no attributes of functions)
    return make


class Algorithm(Section):
    """Base class. A subclass says what it needs and which losses the learner takes, and makes the sequences."""

    student_samples: ClassVar[bool] = True  # the student engines need weights of at most max_staleness steps ago
    teacher_scores: ClassVar[bool] = True  # engines with the teacher's weights are needed
    needs_success: ClassVar[bool] = False  # the environment, or a rule (`graded_by`), says which samples have passed
    plays: ClassVar[bool] = False  # it takes episodes, by Group.episodes, so `environment` may be set
    from_conversations: ClassVar[bool] = False  # rows may be logs: each reply that a user's message follows is a record
    teacher_weights: ClassVar[tuple[str, ...]] = ()  # the values of teacher.weights that have a meaning; none: any
    files: ClassVar[tuple[str, ...]] = ()  # settings that are files, relative to the config file
    learns_from: ClassVar[str] = "demonstrations"  # what its records are, for the lines of a plan
    figure: ClassVar[str] = "The {name} of the loss, without importance weights."  # of `divergence`, for reports

    type: str

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """The learner's losses. `Draft.objective` is an index into them."""
        raise NotImplementedError

    @property
    def skipped(self) -> int:
        """Number of tokens at the start of a completion that no loss includes."""
        return 0

    @property
    def prefix_tokens(self) -> int:
        """Most tokens that stand between the student's prompt and a completion of the student."""
        return 0

    @property
    def trains_demonstrations(self) -> bool:
        """Whether it needs the tokens of demonstrations, so that each row of data.train needs one."""
        return False

    @property
    def likely(self) -> int:
        """Number of the student's most likely tokens that the losses need at each position."""
        return max(loss.divergence.scored.likely for loss in self.losses)

    @property
    def graded_by(self) -> str | None:
        """The rule by which `Group.grade` says whether a reply is right; None: no rule does."""
        return None

    @property
    def needs_context(self) -> bool:
        """Whether each row needs the column that data.template shows the teacher."""
        return True

    @property
    def shows_feedback(self) -> bool:
        """Whether the teacher may see feedback of the environment."""
        return False

    @property
    def least_generations(self) -> int:
        """Least value of sampling.generations with which something is learnt."""
        return 1

    @property
    def recalled(self) -> tuple[str, int | None] | None:
        """A file of prompts without demonstrations that are trained beside data.train, and how many of them.

        None: no such file; None as the number: all of them.
        """
        return None

    @property
    def label(self) -> str:
        """What is learnt, in a few words, for the lines of a plan."""
        return self.type

    async def make(self, group: Group, student: Student, teacher: Teacher) -> list[Draft]:
        """Return drafts of the training sequences of a group. A sample without one is dropped in the ledger.

        It may be called again for the same group, if completions are lost with an engine.
        """
        raise NotImplementedError


Divergences = Annotated[Annotated[Divergence, Field(discriminator="type")], BeforeValidator(short_form("forward"))]


class Distillation(Algorithm):
    """Base class of algorithms whose loss is a divergence between teacher and student."""

    divergence: Divergences = Field(
        Forward(), description="Divergence between teacher and student: forward, reverse, jsd or sampled"
    )
    skip_first: int = Field(3, ge=0, description="Tokens at the start of a completion that are left out of the loss")
    entropy: float = Field(0.0, ge=0, description="Weight of the student's entropy, which the loss rewards; 0: off")
    length: int | None = Field(
        None, ge=1, description="Tokens from which on the weight of a completion falls with its length; null: off"
    )

    @property
    def skipped(self) -> int:
        return self.skip_first

    def loss(self, importance: ImportanceConfig) -> LossConfig:
        """Return the loss with these importance weights."""
        return LossConfig(divergence=self.divergence, importance=importance, entropy=self.entropy, length=self.length)

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        return (self.loss(ImportanceConfig(level="off")),)
