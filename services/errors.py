"""The two errors a user can mend: bad input (exit 2) and a machine or cluster that cannot run the plan (exit 3)."""


class UserError(Exception):
    """Bad configuration or data. The message is one clear sentence: the file, the line or key, and the mend."""

    exit_code = 2


class PreflightError(Exception):
    """The plan cannot run here. The message says what is missing and what would help."""

    exit_code = 3
