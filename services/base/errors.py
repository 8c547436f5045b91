"""What ends a command in a sentence: bad input (exit 2), a machine that cannot run the plan (3), the guard (4), and a
process of the run that failed (1)."""


class UserError(Exception):
    """Bad configuration or data. The message is one clear sentence: the file, the line or key, and the mend."""

    exit_code = 2


class PreflightError(Exception):
    """The plan cannot run here. The message says what is missing and what would help."""

    exit_code = 3


class RetentionLost(Exception):
    """The retention guard has ended the run. The message says what fell, and what is kept."""

    exit_code = 4


class RunFailed(RuntimeError):
    """A process of the run failed. The message is the root cause, what it means, and where the log is."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """An exception's text as a part of one sentence: its first line, or its class where it has no text."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")
