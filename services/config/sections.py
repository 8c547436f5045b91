"""The sections of a configuration. Imports neither torch, ray nor vllm."""

import difflib
import os
import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sdft.actors.config import SamplingConfig
from sdft.actors.shared.own_code import is_own
from sdft.actors.transport.named import BUILT_IN, transport_class
from sdft.learner.config import OptimizerConfig
from sdft.services.algorithms.registry import Method
from sdft.services.base.section import Section
from sdft.services.config.columns import Column, DataColumn, Format, check_columns
from sdft.services.config.detectors import DetectorsConfig
from sdft.services.config.environment import Environment

Grader = Literal[
    "exact", "contains", "choice", "numeric", "tool_call", "instruction", "environment", "judge", "perplexity"
]
# Names that a chat template gets from the run, the tokenizer or transformers.
OWN_VARIABLES = frozenset(
    (
        *("messages", "conversation", "conversations", "tools", "add_generation_prompt", "continue_final_message"),
        *("strftime_now", "raise_exception", "chat_template", "tokenize", "tokenizer_kwargs", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "extra_special_tokens"),
    )
)
SIDES = ("student", "teacher")  # whose prompt a variable of the chat template is for


class DataConfig(Section):
    """Demonstrations, and how the prompts of student and teacher are made from them."""

    train: str = Field(description="A .jsonl or .parquet file (relative to the config file), or a hub data set's name")
    source: str = Field(
        "file",
        description="What train names: file (also a hub data set); log, a .jsonl file to which lines are appended "
        "while the run goes on; or what a class of your own reads, as package.module:Name",
    )
    record_timeout_s: float = Field(
        86400, gt=0, description="How long the run waits for the next record of a source that is no file"
    )
    split: str = Field("train", description="Split of a hub data set")
    format: Format = Field(
        "messages",
        description="Columns of a row: messages (prompt, demonstration, ...), sharegpt (conversations) or alpaca "
        "(instruction, input, output)",
    )
    columns: dict[DataColumn, str] = Field({}, description="Column names in the file: {demonstration: output_text}")
    template: str = Field(
        "paper",
        description="The teacher's prompt: paper, turn, context, feedback, none, or the path of a Jinja template",
    )
    fallback_template: Literal["context", "feedback"] | None = Field(
        None,
        description="The teacher's prompt for rows that lack the column that template shows; null: every row needs it",
    )
    system: str | None = Field(None, description="System message for prompts without one")
    chat_template_kwargs: dict[str, Any] = Field(
        {},
        description="Variables of the model's chat template, such as {enable_thinking: false}. Those under student or "
        "teacher are for the prompts of one alone: {teacher: {enable_thinking: true}}",
    )
    max_prompt_tokens: int = Field(1024, ge=1, description="Longest prompt of the student; a longer one is an error")
    max_teacher_prompt_tokens: int = Field(
        2048, ge=1, description="Longest prompt of the teacher; a longer one is an error"
    )

    @model_validator(mode="after")
    def _two_templates(self) -> "DataConfig":
        if self.fallback_template is not None and self.template in (self.fallback_template, "none"):
            raise ValueError(
                f"fallback_template {self.fallback_template} has no effect with template {self.template}; remove it, "
                f"or set template to one that shows another column"
            )
        return self

    @property
    def grows(self) -> bool:
        """Whether records are added while the run goes on. They are taken in order, each once."""
        return self.source != "file"

    @property
    def student_variables(self) -> dict[str, Any]:
        """Variables of the chat template for the student's prompts, and for demonstrations as replies to them."""
        return self._variables("student")

    @property
    def teacher_variables(self) -> dict[str, Any]:
        """Variables of the chat template for the teacher's prompts."""
        return self._variables("teacher")

    def _variables(self, side: str) -> dict[str, Any]:
        both = {name: value for name, value in self.chat_template_kwargs.items() if name not in SIDES}
        return both | self.chat_template_kwargs.get(side, {})

    @field_validator("chat_template_kwargs")
    @classmethod
    def _variables_of_a_template(cls, given: dict[str, Any]) -> dict[str, Any]:
        groups = {"": {name: value for name, value in given.items() if name not in SIDES}}
        for side in SIDES:
            group = given.get(side, {})
            if not isinstance(group, dict):
                raise ValueError(
                    f"{side} must be a mapping of variables for the {side}'s prompts, such as "
                    f"{{{side}: {{enable_thinking: false}}}}"
                )
            groups[f"{side}."] = group
        for place, group in groups.items():
            for name in group:
                if name in OWN_VARIABLES:
                    raise ValueError(f"{place}{name} is set by the run or the tokenizer; remove it")
                if not name.isidentifier() or (place and name in SIDES):
                    raise ValueError(f"{place}{name} is not the name of a variable of a template; correct it")
        return given

    @model_validator(mode="after")
    def _source_is_known(self) -> "DataConfig":
        if self.source not in ("file", "log") and not is_own(self.source):
            raise ValueError(
                f"source must be file, log, or a class of your own as package.module:Name, not {self.source}"
            )
        if not self.grows and self.record_timeout_s != type(self).model_fields["record_timeout_s"].default:
            raise ValueError("record_timeout_s is of a source that grows; remove it, or set source")
        if self.grows and self.split != "train":
            raise ValueError("split is of a hub data set, and source names none; remove split, or set source: file")
        return self

    @model_validator(mode="after")
    def _columns_of_the_format(self) -> "DataConfig":
        check_columns(self.format, self.columns)
        return self

    @model_validator(mode="after")
    def _teacher_sees_more(self) -> "DataConfig":
        if self.max_teacher_prompt_tokens < self.max_prompt_tokens:
            raise ValueError(
                "max_teacher_prompt_tokens must be at least max_prompt_tokens: the teacher's prompt contains the "
                "student's"
            )
        return self


def check_length(data: DataConfig, epochs: int | None, steps: int | None) -> None:
    """ValueError unless a task on `data` has one length. One on a source that grows may have none: its end is open."""
    if data.grows and epochs is not None:
        raise ValueError(
            f"epochs has no meaning with data.source: {data.source}, whose records are trained once each; remove "
            f"epochs, or give steps"
        )
    if not data.grows and (epochs is None) == (steps is None):
        raise ValueError("give exactly one of epochs and steps")


class TrainingConfig(Section):
    """Length of training: `epochs` over the demonstrations, or a number of `steps`. With stages, each sets its own.

    With a data.source that is no file, the length is `steps`, or ends with the source.
    """

    batch_size: int = Field(32, ge=1, description="Prompts per optimizer step")
    epochs: int | None = Field(None, ge=1, description="Passes over the demonstrations; give this or steps")
    steps: int | None = Field(None, ge=1, description="Optimizer steps; give this or epochs")
    max_staleness: int = Field(
        0, ge=0, description="Steps that a rollout's weights may be behind; 0: the strict, synchronous algorithm"
    )

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingConfig":
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give exactly one of epochs and steps")
        return self


class WeightsConfig(Section):
    """How often the engines get new weights, and how closely they must agree with the learner's."""

    sync_every: int = Field(1, ge=1, description="Optimizer steps between two updates of the student engines")
    teacher_sync_every: int = Field(1, ge=1, description="The same for the teacher engines; the EMA moves every step")
    swap: Literal["together", "one_by_one"] = Field(
        "together", description="Whether a role's engines pause for an update at the same time or in turn"
    )
    transport: str = Field(
        "memory",
        description="memory: each engine maps the snapshot; broadcast: the learner sends it to all engines of a role; "
        "ipc (device: cuda only): engines copy it from the learner's GPU memory; or the import path of your own, as "
        "package.module:Name",
    )
    max_probe_gap: float | None = Field(
        None, gt=0, description="Largest relative gap of the probe; null: 0.001 in float32, 0.08 in bfloat16"
    )
    timeout_s: float = Field(300, gt=0, description="How long an engine may take to load and verify new weights")

    @field_validator("transport")
    @classmethod
    def _a_transport(cls, name: str) -> str:
        if is_own(name):
            transport_class(name)  # raises NotImportable
        elif name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            mend = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"{name} is not memory, broadcast, ipc or the import path of your own, package.module:Name{mend}"
            )
        return name

    @model_validator(mode="after")
    def _all_at_once(self) -> "WeightsConfig":
        if self.transport == "broadcast" and self.swap == "one_by_one":
            raise ValueError(
                "transport: broadcast reaches all engines at once; set swap: together, or transport: memory"
            )
        return self


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


class StageConfig(Section):
    """One task of a stream of tasks. Method, sampling and optimizer default to those of the run."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="Name of the stage, in lower case")
    data: DataConfig
    epochs: int | None = Field(None, ge=1, description="Passes over the stage's demonstrations; give this or steps")
    steps: int | None = Field(None, ge=1, description="Optimizer steps of the stage; give this or epochs")
    method: Method | None = Field(None, description="null: the run's")
    environment: Environment | None = Field(None, description="null: the run's")
    sampling: SamplingConfig | None = Field(None, description="null: the run's")
    optimizer: OptimizerConfig | None = Field(None, description="null: learner.optimizer")
    keep_moments: bool = Field(False, description="Keep AdamW's moments of the previous stage; false: from zero")
    sets: tuple[EvaluationSet, ...] = Field((), description="Evaluation sets of this task")

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        check_length(self.data, self.epochs, self.steps)
        return self


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


class CheckpointConfig(Section):
    """When to save, and how many checkpoints to keep. The last step is always saved."""

    every: int = Field(50, ge=1, description="Steps between two checkpoints")
    keep: int = Field(2, ge=1, description="Number of checkpoints kept; older ones are removed")
    timeout_s: float = Field(600, gt=0, description="How long a checkpoint may take to reach the disk")


class MonitoringConfig(Section):
    """Sinks for metrics beside metrics.jsonl, the stall notice, and the recording of rollouts."""

    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory")
    wandb_project: str | None = Field(None, description="Project of Weights & Biases to log to; null: none")
    mlflow_experiment: str | None = Field(None, description="MLflow experiment to log to; null: none")
    # Off: a run's own cluster uses ports that change with every run, so no Prometheus server is configured for them.
    prometheus: bool = Field(False, description="Serve metrics with those of the Ray node, for Prometheus to fetch")
    stall_s: float = Field(600, gt=0, description="Seconds in which no wait ends, after which the run prints its waits")
    record_rollouts: bool = Field(False, description="Keep every batch in rollouts/, for `sdft replay`")


class RayConfig(Section):
    """The Ray cluster: a running one (`address`, or RAY_ADDRESS in the environment), else one started by the run."""

    address: str | None = Field(
        None, description="Address of a running cluster; null: RAY_ADDRESS, else a cluster of the run's own"
    )
    wait_s: float = Field(300, gt=0, description="How long to wait for the cluster's resources")
    autoscaling: bool = Field(False, description="The cluster has an autoscaler: request nodes and wait for them")
    gpu_memory_gib: float | None = Field(
        None,
        gt=0,
        description="Memory of a GPU of the cluster, which the plan must fit; null: of this machine's GPUs, and not "
        "known of a running cluster",
    )

    @property
    def running(self) -> str | None:
        """Address of the running cluster to use; None (Ray's "local"): the run starts its own."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        return None if address == "local" else address
