"""
What the mirror has done, for Prometheus: requests and bytes by end and source.

Layer: mirror. Who calls: mirror.pulling counts; mirror.serving answers `/metrics`. Label values are ours, and few:
registries and repositories are none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.mirror.download import Counted

_BUCKETS: Final = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class Figures:
    """`fetched`: bytes by where they came from, of mirror.pieces. On the loop."""

    def __init__(self, fetched: Counted) -> None:
        self._registry = CollectorRegistry()
        self._fetched = fetched
        self._requests = Counter("lazyfs_mirror_requests", "Requests answered: what for, from where, which status.",
                                 ("end", "source", "status"), registry=self._registry)
        self._bytes = Counter("lazyfs_mirror_sent_bytes", "Bytes of bodies sent to clients, by where they were.",
                              ("end", "source"), registry=self._registry)
        self._seconds = Histogram("lazyfs_mirror_request_seconds", "From a request to its answer's end.", ("end",),
                                  registry=self._registry, buckets=_BUCKETS)
        self._registry.register(_Fetched(fetched))

    def answered(self, end: str, source: str, status: int, sent_bytes: int, seconds: float) -> None:
        """One request's answer has ended; status 0: the client went before it began."""
        self._requests.labels(end, source, str(status)).inc()
        self._bytes.labels(end, source).inc(sent_bytes)
        self._seconds.labels(end).observe(seconds)

    def told(self) -> dict[str, dict[str, int]]:
        """For people, since the start: requests and bytes sent, by source; bytes fetched and pieces mended."""
        return {"requests": _by_source(self._requests), "sent_bytes": _by_source(self._bytes),
                "fetched_bytes": {"peers": self._fetched.peers, "registry": self._fetched.origin},
                "wrong_pieces": {"mended": self._fetched.wrong}}

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


def _by_source(counter: Counter) -> dict[str, int]:
    found: dict[str, int] = {}
    for sample in (one for family in counter.collect() for one in family.samples if one.name.endswith("_total")):
        source = sample.labels["source"]
        found[source] = found.get(source, 0) + int(sample.value)
    return found


class _Fetched(Collector):
    def __init__(self, fetched: Counted) -> None:
        self._fetched = fetched

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily("lazyfs_mirror_wrong_pieces", "Pieces that were not the origin's, and were replaced.",
                                  self._fetched.wrong)
        family = CounterMetricFamily("lazyfs_mirror_fetched_bytes", "Bytes of blobs and files fetched, by source.",
                                     labels=("source",))
        family.add_metric(("peer",), self._fetched.peers)
        family.add_metric(("registry",), self._fetched.origin)
        yield family
