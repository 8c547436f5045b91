"""Names of the built-in teacher templates."""

# What each shows to the teacher beside the prompt: a column of the data.
BUILT_IN_TEMPLATES: dict[str, str | None] = {
    "paper": "demonstration",
    "turn": "demonstration",
    "context": "context",
    "feedback": "feedback",
    "none": None,
}
