"""Settings of the detectors: how far a figure of the completions may move from its value at the start of the stage."""

from pydantic import Field, field_validator, model_validator

from sdft.services.base.section import Section


class DetectorsConfig(Section):
    """Compares figures of the completions, and the divergence, with those of the first steps of the stage.

    Each is a mean over `window` steps. null switches a detector off.
    """

    window: int = Field(10, ge=1, description="Steps of each mean; the first comparison is after twice as many")
    length: float | None = Field(
        2.0, gt=1, description="Largest factor by which the mean length of completions may rise or fall"
    )
    length_tail: float | None = Field(
        2.0, gt=1, description="Largest factor by which the 95th percentile of lengths may rise"
    )
    truncated: float | None = Field(0.2, gt=0, lt=1, description="Largest rise of the share truncated (0.2: 20 points)")
    empty: float | None = Field(0.1, gt=0, lt=1, description="Largest rise of the share empty")
    repeated: float | None = Field(
        0.2, gt=0, lt=1, description="Largest rise of the share of 3-grams repeated in a completion"
    )
    distinct: float | None = Field(
        0.3, gt=0, lt=1, description="Largest fall of the distinct 3-grams of a batch, as a share of all"
    )
    entropy: float | None = Field(4.0, gt=1, description="Largest factor by which the entropy may rise or fall")
    divergence: float | None = Field(2.0, gt=1, description="Largest factor by which the divergence may rise")
    leaks: float | None = Field(
        0.1, gt=0, lt=1, description="Largest rise of the share with words of the teacher's template"
    )
    phrases: tuple[str, ...] = Field(
        (), description="Texts that count as words of the teacher's template, such as `Following the example`"
    )
    thoughts: float | None = Field(
        0.3, gt=0, lt=1, description="Largest rise or fall of the share with a mark of reasoning"
    )

    @field_validator("phrases")
    @classmethod
    def _are_texts(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if not all(phrase.strip() for phrase in phrases):
            raise ValueError("an empty phrase is in every completion; remove it")
        return phrases

    @model_validator(mode="after")
    def _phrases_are_counted(self) -> "DetectorsConfig":
        if self.phrases and self.leaks is None:
            raise ValueError("phrases are counted by leaks, which is off; set leaks, or remove phrases")
        return self
