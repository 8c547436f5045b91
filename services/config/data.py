"""The section data: the demonstrations, and how prompts are made of them. Imports neither torch, ray nor vllm."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sdft.actors.shared.own_code import is_own
from sdft.services.base.section import Section
from sdft.services.config.columns import DataColumn, Format, check_columns

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
