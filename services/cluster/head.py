"""Ray's processes of a run's own cluster, started in a session of their own.

A signal to the driver's process group (a scheduler's SIGTERM, a shell's kill) does not reach them, so the driver can
stop its engines and learner before they end.

    settings, as JSON on the command line ─► start ─► {"address": ...} or {"error": ...} on standard output
    the end of standard input: the driver has stopped ─► shut down
    the driver is killed ─► the kernel ends this process, and Ray's with it

The file runs as a script, and imports nothing else of this package.
"""

import json
import os
import signal
import sys
import threading

import ray

STOP_S = 5


def main(settings: str) -> None:
    """Start Ray with these settings (JSON), print the address or the error, and shut down when standard input ends."""
    ignore_signals()
    try:
        context = ray.init(address="local", include_dashboard=False, log_to_driver=False, **json.loads(settings))
    except Exception as error:  # noqa: BLE001 - the driver reports it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    ignore_signals()  # ray.init has replaced the handlers
    print(json.dumps({"address": context.address_info["gcs_address"]}), flush=True)
    sys.stdin.buffer.read()
    # If Ray's control service has ended first, its clients wait for it without a limit. The kernel ends Ray's processes
    # with this one.
    limit = threading.Timer(STOP_S, os._exit, [1])
    limit.daemon = True
    limit.start()
    ray.shutdown()


def ignore_signals() -> None:
    """Ignore SIGTERM, SIGINT and SIGHUP: if all processes of a job get them, the driver ends, and ends this process.

    The handler is not SIG_IGN, which Ray's processes would inherit.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


if __name__ == "__main__":
    main(sys.argv[1])
