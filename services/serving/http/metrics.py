"""The figures of a service for Prometheus."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sdft.services.releases.state import STATUSES

if TYPE_CHECKING:
    from sdft.services.serving.http.ask import Asking
    from sdft.services.serving.service import Service

Samples = Iterable[tuple[str, float]]  # labels, value


def metrics_text(service: "Service", asking: "Asking") -> str:
    """Return the figures in Prometheus' text format."""
    state, pool = service.journal.state, service.pool
    figures: list[tuple[str, str, str, Samples]] = [
        ("release", "gauge", "Release that is served", [("", state.served or 0)]),
        ("engines_up", "gauge", "Engines that take requests", [("", sum(e.free for e in pool.engines))]),
        ("engine_starts_total", "counter", "Starts of engines", [("", sum(e.starts for e in pool.engines))]),
        ("requests_in_flight", "gauge", "Requests that an engine answers", [("", pool.in_flight)]),
        ("requests_waiting", "gauge", "Requests that no engine has taken yet", [("", pool.waiting)]),
        ("answers_total", "counter", "Answers with status 200", [("", asking.answered)]),
        ("answer_seconds_total", "counter", "Seconds of these answers, from request to end", [("", asking.seconds)]),
        ("answers_failed_total", "counter", "Requests without a whole answer", [("", asking.failed)]),
        (
            "records",
            "gauge",
            "Records by state",
            [(f'{{state="{name}"}}', count) for name, count in service.counts().items()],
        ),
        ("windows_total", "counter", "Windows that have begun", [("", len(state.windows))]),
        (
            "releases",
            "gauge",
            "Releases by status",
            [
                (f'{{status="{status}"}}', sum(r.status == status for r in state.releases.values()))
                for status in STATUSES
            ],
        ),
    ]
    lines = []
    for name, kind, about, samples in figures:
        lines += [f"# HELP sdft_service_{name} {about}", f"# TYPE sdft_service_{name} {kind}"]
        lines += [f"sdft_service_{name}{labels} {value:g}" for labels, value in samples]
    return "\n".join(lines) + "\n"
