"""Exceptions that end a command with one sentence: bad input (exit 2), a machine that cannot run the plan (3), the
retention guard (4), and a failed process of the run (1)."""


class UserError(Exception):
    """Bad configuration or data. The message is one clear sentence: the file, the line or key, and the fix."""

    exit_code = 2


class PromptTooLong(UserError):
    """A teacher's prompt that was made during the run is longer than data.max_teacher_prompt_tokens."""


class PreflightError(Exception):
    """The plan cannot run here. The message names what is missing and what would help."""

    exit_code = 3


class RetentionLost(Exception):
    """The retention guard has ended the run. The message names the sets that fell, and what is kept."""

    exit_code = 4


class RunFailed(RuntimeError):
    """A process of the run failed. The message has the root cause, what it means, and the path of the log."""

    exit_code = 1


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text, without a final dot, or its class if it has no text."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")
