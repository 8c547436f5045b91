"""The command `sdft`.

Exit 0: done; 1: a process of the run failed, or a crash; 2: bad configuration or data; 3: it cannot run here; 4: the
retention guard ended the run; 130: stopped by SIGINT or SIGTERM; 141: the reader of the output has gone.
"""

import sys
from collections.abc import Sequence

from sdft.services.base.environment import check_environment, named_proxies
from sdft.services.base.errors import PreflightError, RetentionLost, RunFailed, UserError
from sdft.services.base.output import CLOSED, OutputFailed, drop, raising_output, reader_gone
from sdft.services.base.signals import STOPPED, sigterm_interrupts
from sdft.services.cli.app import parse
from sdft.services.cli.commands.serve import serve
from sdft.services.cli.commands.train import check, train
from sdft.services.data.without_torch import promise_tokenizers_only


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    try:
        with raising_output():
            return _main(argv)
    except BrokenPipeError:
        if reader_gone():
            return CLOSED
        raise
    except OutputFailed as error:
        _say(f"the output cannot be written ({error.strerror}); make room, or send it elsewhere")
        return PreflightError.exit_code


def _main(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else argv
    command = parse(words)
    if isinstance(command, int):
        return command
    if argv is None and command.func in (train, check, serve):  # the process runs this command only
        promise_tokenizers_only()
    try:
        with sigterm_interrupts():
            check_environment()
            return command() or 0
    except (UserError, PreflightError, RetentionLost, RunFailed) as error:
        _say(str(error))
        return error.exit_code
    except ImportError as error:
        if "socksio" not in str(error):
            raise
        _say(
            f"the environment names a SOCKS proxy ({named_proxies()}), which needs the package socksio; run "
            f"`pip install socksio`, or unset the variable"
        )
        return UserError.exit_code
    except KeyboardInterrupt:
        resumes = "; the same command resumes from the last checkpoint" if command.func in (train, serve) else ""
        _say(f"stopped{resumes}")
        return STOPPED


def _say(text: str) -> None:
    """Print a line on standard error, which may be on the same full disk as the output."""
    try:
        print(f"sdft: {text}", file=sys.stderr)
    except OSError:
        drop(sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
