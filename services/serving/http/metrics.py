"""The figures of a service for Prometheus, read when they are asked for."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sdft.services.releases.state import STATUSES

if TYPE_CHECKING:
    from sdft.services.serving.http.ask import Asking
    from sdft.services.serving.service import Service

PREFIX = "sdft_service_"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


def times(name: str, about: str) -> Histogram:
    """Return a histogram of seconds."""
    return Histogram(PREFIX + name, about, buckets=SECONDS, registry=None)


class _Figures(Collector):
    def __init__(self, service: "Service", asking: "Asking") -> None:
        self._service, self._asking = service, asking

    def collect(self) -> Iterator[Metric]:
        state, pool, asking = self._service.journal.state, self._service.pool, self._asking
        yield _gauge("release", "Release that is served", state.served or 0)
        yield _gauge("engines", "Engines, those that start included", len(pool.engines))
        yield _gauge("engines_up", "Engines that take requests", sum(e.free for e in pool.engines))
        yield _counter("engine_starts", "Starts of engines", pool.starts)
        yield _counter("engine_losses", "Ends of engines that were up", pool.losses)
        yield _gauge("requests_in_flight", "Requests that an engine answers", pool.in_flight)
        yield _gauge("requests_waiting", "Requests that no engine has taken yet", pool.waiting)
        yield _counter("answers_failed", "Requests without a whole answer", asking.failed)
        yield from asking.answered.collect()
        yield from asking.first_piece.collect()
        yield _by("records", "Records by state", "state", self._service.records.counts())
        yield _counter("windows", "Windows that have begun", len(state.windows))
        statuses = {status: sum(r.status == status for r in state.releases.values()) for status in STATUSES}
        yield _by("releases", "Releases by status", "status", statuses)


def registry_of(service: "Service", asking: "Asking") -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(service, asking))
    return registry


def _gauge(name: str, about: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, about, value=value)


def _counter(name: str, about: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, about, value=value)


def _by(name: str, about: str, label: str, values: Mapping[str, float]) -> Metric:
    metric = GaugeMetricFamily(PREFIX + name, about, labels=[label])
    for key, value in values.items():
        metric.add_metric([key], value)
    return metric
