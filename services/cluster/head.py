"""Ray's processes of a run's own cluster, started in a session of their own.

A signal to the driver's process group (a scheduler's SIGTERM, a shell's kill) does not reach them, so the driver can
stop its engines and learner before they end.

    settings, as JSON on the command line ─► start ─► {"address": ...} or {"error": ...} on standard output
    the end of standard input: the driver has stopped, or died ─┬─► shut down
                                                                └─► after STOP_S: kill what is left of the session

The file runs as a script, and imports nothing else of this package.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

STOP_S = 5
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(settings: str) -> None:
    """Start Ray with these settings (JSON), print the address or the error, and shut down when standard input ends."""
    head = os.getpid()
    if os.fork() == 0:  # before Ray starts threads
        guard(head)
        os._exit(0)
    import ray

    ignore_signals()
    try:
        context = ray.init(address="local", include_dashboard=False, log_to_driver=False, **json.loads(settings))
    except Exception as error:  # noqa: BLE001 - the driver reports it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    ignore_signals()  # ray.init has replaced the handlers
    print(json.dumps({"address": context.address_info["gcs_address"]}), flush=True)
    sys.stdin.buffer.read()
    ray.shutdown()


def guard(head: int) -> None:
    """Wait for the end of standard input; then leave the session STOP_S to end, and kill what is left of it.

    Three waits of Ray have no limit: of ray.init, in C++ code that lets no thread run, if the folder of the session is
    removed, as the next run does for a killed driver; of ray.shutdown, if Ray's control service has ended first; and of
    a worker that is still starting when that service ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the driver sees the end of the head by this pipe
    while os.getppid() == head and os.read(sys.stdin.fileno(), 1):
        pass
    until = time.monotonic() + STOP_S
    while others(head) and time.monotonic() < until:
        time.sleep(0.1)
    while left := others(head):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)


def others(session: int) -> list[int]:
    """Return the processes of a session but this one, without zombies."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, its, *_ = (place / "stat").read_text().rpartition(")")[2].split()
            if int(its) == session and state != "Z" and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


def ignore_signals() -> None:
    """Ignore SIGTERM, SIGINT and SIGHUP: if all processes of a job get them, the driver ends, and ends this process.

    The handler is not SIG_IGN, which Ray's processes would inherit.
    """
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)


if __name__ == "__main__":
    main(sys.argv[1])
