"""The driver of a run, in packages by what they are for, in layers (pyproject.toml, import-linter)."""
