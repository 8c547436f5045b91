"""Ray's processes of a run's own cluster, started in a session of their own.

A signal that the driver's process group gets (a scheduler's SIGTERM, a shell's kill) does not reach them, so the driver
can stop its engines and learner before they end.

    settings, as JSON on the command line ─► start ─► {"address": ...} or {"error": ...} on standard output
    the end of standard input: the driver has stopped, or died ─► shut down

Run as a file, it imports nothing of ours.
"""

import json
import os
import signal
import sys
import threading

import ray

STOP_S = 10


def main(settings: str) -> None:
    hold_out()
    try:
        context = ray.init(address="local", include_dashboard=False, log_to_driver=False, **json.loads(settings))
    except Exception as error:  # noqa: BLE001 - the driver makes a sentence of it
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    hold_out()  # Ray has put its own handlers in their place
    print(json.dumps({"address": context.address_info["gcs_address"]}), flush=True)
    sys.stdin.buffer.read()
    # If Ray's control service was ended first, its clients wait for it. The kernel ends Ray's processes with this one.
    limit = threading.Timer(STOP_S, os._exit, [1])
    limit.daemon = True
    limit.start()
    ray.shutdown()


def hold_out() -> None:
    """Signals for every process of a job end the driver, and it ends this one. Not SIG_IGN, which Ray's processes would
    inherit."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


if __name__ == "__main__":
    main(sys.argv[1])
