"""Names of the built-in teacher templates."""

# Template -> the column of the data that the teacher sees beside the prompt; None: the prompt alone.
BUILT_IN_TEMPLATES: dict[str, str | None] = {
    "paper": "demonstration",
    "turn": "demonstration",
    "context": "context",
    "feedback": "feedback",
    "none": None,
}
