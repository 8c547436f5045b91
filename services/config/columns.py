"""The columns that a row of data may have, in each format (data.format)."""

from typing import Literal, get_args

Format = Literal["messages", "sharegpt", "alpaca"]
Column = Literal["prompt", "demonstration", "id", "context", "feedback", "answer", "text", "tools", "teacher"]
COLUMNS: tuple[str, ...] = get_args(Column)
DataColumn = Literal[Column, "conversations", "instruction", "input", "output", "system", "history"]
# Columns of a format, which take the place of `prompt` and `demonstration`.
OF_FORMAT: dict[Format, tuple[str, ...]] = {
    "messages": (),
    "sharegpt": ("conversations", "system"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
}
REPLACED: dict[Format, tuple[str, ...]] = {
    "messages": (),
    "sharegpt": ("prompt",),
    "alpaca": ("prompt", "demonstration"),
}


def check_columns(format_: Format, columns: dict[DataColumn, str]) -> None:
    """ValueError if a name in data.columns is not a column of the format."""
    of_format = (*OF_FORMAT[format_], *(column for column in COLUMNS if column not in REPLACED[format_]))
    wrong = next((column for column in columns if column not in of_format), None)
    if wrong is not None:
        raise ValueError(
            f"columns.{wrong} is not a column of format: {format_}; its columns are {', '.join(of_format)}"
        )
