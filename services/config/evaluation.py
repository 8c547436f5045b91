"""The sections evaluation and retention: the sets, and what may not fall. Imports neither torch, ray nor vllm."""

import re
from typing import Literal

from pydantic import Field, model_validator

from sdft.services.base.section import Section
from sdft.services.config.columns import Column
from sdft.services.config.detectors import DetectorsConfig
from sdft.services.config.environment import Environment

Grader = Literal[
    "exact", "contains", "choice", "numeric", "tool_call", "instruction", "environment", "judge", "perplexity"
]


class JudgeConfig(Section):
    """A language model that grades replies, behind an endpoint with OpenAI's protocol."""

    url: str = Field(description="Address of the API, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="Name of the model at the endpoint")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if one is needed")
    max_tokens: int = Field(16, ge=1, description="Longest verdict; more for a model that reasons before its verdict")
    concurrency: int = Field(16, ge=1, description="Requests in flight at once")
    timeout_s: float = Field(120, gt=0, description="Limit for each request; a failed one is retried twice")

    @model_validator(mode="after")
    def _an_address(self) -> "JudgeConfig":
        if not re.match(r"https?://(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+)(:\d+)?(/|$)", self.url):
            raise ValueError(f"url {self.url} is not the address of an API; write it as http://HOST:8000/v1")
        return self


class EvaluationSet(Section):
    """One file of questions with answers. With grader: perplexity, a file of texts that the model scores."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Name of the set, in lower case")
    file: str = Field(description="A .jsonl or .parquet file of questions with answers, relative to the config file")
    grader: Grader = Field(
        description="The rule that decides whether a reply is right; environment: each question is an episode, and the "
        "environment says whether it has passed; perplexity scores texts instead"
    )
    environment: Environment | None = Field(
        None, description="With grader: environment; null: the environment of the run"
    )
    judge: JudgeConfig | None = Field(None, description="The model that grades, with grader: judge")
    columns: dict[Column, str] = Field({}, description="Column names in the file: {answer: golden_answer}")
    role: Literal["task", "retention"] = Field(
        "task", description="retention: the model must not forget this; see the section retention"
    )
    rows: int | None = Field(None, ge=1, description="Number of rows, spread evenly over the file; null: all")
    max_new_tokens: int = Field(64, ge=1, description="Longest reply in tokens")
    pass_at: tuple[int, ...] = Field((), description="Values of k, at most 128, for pass@k of sampled replies")
    pass_samples: int | None = Field(
        None, ge=1, description="Replies sampled for each question for pass_at; null: twice the largest k"
    )
    pass_temperature: float = Field(1.0, gt=0, description="Sampling temperature of these replies")

    @property
    def sampled(self) -> int:
        """Replies sampled for each question, beside the greedy one; 0 without pass_at."""
        return self.pass_samples or 2 * max(self.pass_at) if self.pass_at else 0

    @property
    def is_text(self) -> bool:
        """Whether the set holds texts to score instead of questions."""
        return self.grader == "perplexity"

    @model_validator(mode="after")
    def _texts_have_no_answers(self) -> "EvaluationSet":
        if self.is_text and self.pass_at:
            raise ValueError("pass_at needs replies, and grader: perplexity samples none; remove pass_at")
        return self

    @model_validator(mode="after")
    def _environment_and_grader(self) -> "EvaluationSet":
        if self.environment is not None and self.grader != "environment":
            raise ValueError(f"environment has no effect with grader {self.grader}; set grader: environment")
        if self.grader == "environment" and self.pass_at:
            raise ValueError("pass_at samples single replies, and grader: environment plays episodes; remove pass_at")
        return self

    @model_validator(mode="after")
    def _judge_and_grader(self) -> "EvaluationSet":
        if (self.grader == "judge") != (self.judge is not None):
            raise ValueError("grader: judge and the section judge (url, model) go together; give both, or neither")
        return self

    @model_validator(mode="after")
    def _enough_answers(self) -> "EvaluationSet":
        if self.pass_at and not 1 <= min(self.pass_at) <= max(self.pass_at) <= 128:
            raise ValueError(f"pass_at {list(self.pass_at)}: give values of k from 1 to 128")
        if self.pass_at and self.sampled < max(self.pass_at):
            raise ValueError(
                f"pass_samples {self.sampled} is less than the largest k of pass_at, {max(self.pass_at)}; raise "
                f"pass_samples"
            )
        return self


class EvaluationConfig(Section):
    """Greedy evaluation before, during and after the run, on the student engines or on a pool of role evaluation."""

    every: int | None = Field(None, ge=1, description="Steps between evaluations; null: only before and after training")
    sets: tuple[EvaluationSet, ...] = ()
    record: bool = Field(False, description="Keep every graded reply in samples.jsonl, not the first six of a set")
    grading_timeout_s: float = Field(
        1800, gt=0, description="How long a judge may take for the replies to one set, or lm-eval for its tasks"
    )


class RetentionConfig(Section):
    """The retention guard: compares retention sets with their results before training, by `max_drop`, and figures of
    the completions with the start of the stage, by `detectors`. One of the two may be left out."""

    sets: tuple[str, ...] = Field((), description="Names of evaluation sets; empty: all with role: retention")
    max_drop: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest drop of an accuracy (0.05: 5 points), or rise of a perplexity (0.05: 5 %); null: no set "
        "is guarded",
    )
    max_drop_pass_at: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Largest drop of each pass@k of the guarded sets; null: it is not guarded",
    )
    detectors: DetectorsConfig | None = Field(None, description="null: no detectors; {}: all, with their defaults")
    action: Literal["warn", "stop", "rollback"] = Field(
        "warn", description="stop: end the run; rollback: also set aside the checkpoints after the last good one"
    )

    @model_validator(mode="after")
    def _guards_something(self) -> "RetentionConfig":
        if self.max_drop is None and self.detectors is None:
            raise ValueError("nothing is guarded; set max_drop, for evaluation sets, or detectors")
        if self.max_drop is None and self.sets:
            raise ValueError("sets have no effect without max_drop; set max_drop, or remove sets")
        if self.max_drop is None and self.max_drop_pass_at is not None:
            raise ValueError("max_drop_pass_at is of sets that max_drop guards; set max_drop too")
        return self
