"""
The tracker's metrics, in Prometheus' text format; their table is in docs/tracker.md. Pure.

Layer: tracker. Who calls: tracker.run, when somebody asks (imported then). Labels are bounded: clusters only, which an
operator names; resources and members are never labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prometheus_client import Metric as Family

    from lazyfs.tracker.server import Traffic
    from lazyfs.tracker.service import Service

_COUNTERS = {
    "beats": ("lazyfs_tracker_beats_total", "Signs of life of members."),
    "changes": ("lazyfs_tracker_changes_total", "Beats that said something new."),
    "joins": ("lazyfs_tracker_joins_total", "Swarms that members have joined."),
    "leaves": ("lazyfs_tracker_leaves_total", "Members that said that they leave."),
    "reports": ("lazyfs_tracker_reports_total", "Reports of members about others."),
    "releases": ("lazyfs_tracker_releases_total", "Times that a member was told that a copy for others can go."),
    "tokens_asked": ("lazyfs_tracker_tokens_asked_total", "Questions of nodes for tokens."),
    "tokens_issued": ("lazyfs_tracker_tokens_issued_total", "Tokens that were signed."),
    "tokens_refused": ("lazyfs_tracker_tokens_refused_total", "Questions whose right was not proved."),
    "tokens_failed": ("lazyfs_tracker_tokens_failed_total", "Questions that no registry could be asked about."),
    "view_bytes": ("lazyfs_tracker_view_bytes_total", "Of views that were sent."),
}
_GAUGES = {
    "members": ("lazyfs_tracker_members", "Members of a cluster."),
    "swarms": ("lazyfs_tracker_swarms", "Resources that members share."),
    "isolated": ("lazyfs_tracker_isolated", "Members that are in no view, because others reported them."),
    "origin": ("lazyfs_tracker_origin_copies", "Whole resources that came from the registry, of those shared now."),
}
_CLUSTER_COUNT_MAX = 100


def page(service: Service, traffic: Traffic) -> bytes:
    """All of it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(service, traffic))
    return generate_latest(registry)


class _Page(Collector):
    def __init__(self, service: Service, traffic: Traffic) -> None:
        self._service, self._traffic = service, traffic

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        yield GaugeMetricFamily("lazyfs_tracker_ready", "1: its store answers.",
                                value=float(not self._service.store.problem()))
        yield GaugeMetricFamily("lazyfs_tracker_connections", "Open connections.",
                                value=float(self._traffic.connections))
        answers = CounterMetricFamily("lazyfs_tracker_answers_total", "Requests answered, by status.",
                                      labels=["status"])
        for status, count in sorted(self._traffic.statuses.items()):
            answers.add_metric([str(status)], float(count))
        yield answers
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, value=float(self._service.counters[name]))
        yield from self._clusters()

    def _clusters(self) -> Iterator[Family]:
        families = {name: GaugeMetricFamily(metric, text, labels=["cluster"])
                    for name, (metric, text) in _GAUGES.items()}
        for name, cluster in sorted(self._service.store.clusters.items())[:_CLUSTER_COUNT_MAX]:
            origin = sum(one.origin for swarm in cluster.swarms.values() for one in swarm.members.values()) / 1000
            for gauge, value in (("members", len(cluster.members)), ("swarms", len(cluster.swarms)),
                                 ("isolated", len(cluster.isolated)), ("origin", origin)):
                families[gauge].add_metric([name], float(value))
        yield from families.values()
