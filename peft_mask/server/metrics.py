"""The figures of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_GAUGES = ("most_adapters", "cache_bytes", "cache_adapters", "cache_slots", "cache_leases")  # all others only grow
_PREFIX = "peft_mask_"


class HttpMetrics:
    """Requests, by path and status, and how long they took."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(f"{_PREFIX}requests", "Requests.", ["path", "status"], registry=self._registry)
        self._seconds = Histogram(
            f"{_PREFIX}request_seconds", "Seconds of a request.", ["path"], registry=self._registry
        )

    def count(self, path: str, status: int, seconds: float) -> None:
        """Add a request that was answered."""
        self._requests.labels(path, status).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self, figures: Sequence[Mapping[str, float]]) -> bytes:
        """Return all in Prometheus' text format.

        Args:
            figures: of each replica by name.
        """
        replicas = CollectorRegistry()
        replicas.register(_Replicas(figures))
        return generate_latest(self._registry) + generate_latest(replicas)


class _Replicas(Collector):
    def __init__(self, figures: Sequence[Mapping[str, float]]) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        for name in self._figures[0] if self._figures else ():
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            metric = kind(_PREFIX + name, name.replace("_", " ").capitalize() + ".", labels=["replica"])
            for number, figures in enumerate(self._figures):
                metric.add_metric([str(number)], figures[name])
            yield metric
