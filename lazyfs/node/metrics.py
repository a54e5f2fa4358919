"""
The metrics of a node: their names, kinds and meaning, and how each is read out of a snapshot. Pure.

Layer: node. Who calls: node.observing for `/metrics` (imported when first asked), cli.metrics; `python -m
lazyfs.node.metrics` writes the table of docs/observability.md, which a test compares. Names follow Prometheus'
conventions: base units, `_total` on what only grows. Label values are bounded: kinds are classes of ours, servers at
most 33; images are never labels. A snapshot is that of node.observing; what it does not hold is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from prometheus_client import Metric as Family

    Snapshot = Mapping[str, Any]
    Values = Iterable[tuple[tuple[str, ...], float]]    # label values, number

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
_SOURCE_COUNT_MAX = 32
_SOURCE_STATES = ("ok", "failing", "down", "probing", "paused", "refusing", "lying")


class Metric(NamedTuple):
    """One metric; `read` gives its values, none if the snapshot does not know."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str
    read: Callable[[Snapshot], Values]


def _one(*path: str, factor: float = 1.0) -> Callable[[Snapshot], Values]:
    """The number at a place of the snapshot."""
    def read(snapshot: Snapshot) -> Values:
        found: Any = snapshot
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return [((), float(found) * factor)] if isinstance(found, bool | int | float) else []
    return read


def _several(*pairs: tuple[str, tuple[str, ...]]) -> Callable[[Snapshot], Values]:
    """Numbers at several places, each under its label value."""
    def read(snapshot: Snapshot) -> Values:
        return [((label,), number) for label, path in pairs for _, number in _one(*path)(snapshot)]
    return read


def _mapped(*path: str) -> Callable[[Snapshot], Values]:
    """A mapping of label values to numbers."""
    def read(snapshot: Snapshot) -> Values:
        found: Any = snapshot
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return [((str(name),), float(number)) for name, number in sorted((found or {}).items())]
    return read


def _takeovers(snapshot: Snapshot) -> Values:
    turns = snapshot.get("keeper", {}).get("turns")
    return [] if turns is None else [((), float(max(0, turns - 1)))]


def _mounts(snapshot: Snapshot) -> Values:
    if "broken" not in snapshot:
        return []
    return [*_several(("attached", ("mounted",)), ("detached", ("detached",)))(snapshot),
            (("broken",), float(len(snapshot["broken"])))]


def _sources(key: str) -> Callable[[Snapshot], Values]:
    def read(snapshot: Snapshot) -> Values:
        return [((one["source"],), float(one[key])) for one in _known(snapshot) if key in one]
    return read


def _source_states(snapshot: Snapshot) -> Values:
    return [((one["source"], state), float(one["state"] == state))
            for one in _known(snapshot) for state in _SOURCE_STATES]


def _known(snapshot: Snapshot) -> list[Mapping[str, Any]]:
    """Those sources that are asked most: a directory of images is a source each."""
    return sorted(snapshot.get("sources", ()), key=lambda one: (-one["requests"], one["source"]))[:_SOURCE_COUNT_MAX]


def _troubles(snapshot: Snapshot) -> Values:
    return [((), float(len(snapshot["cache"]["trouble"])))] if "trouble" in snapshot.get("cache", {}) else []


def _calls(snapshot: Snapshot) -> list[tuple[str, str, float, float]]:
    """(call, code, how many, seconds) of snapshotter.calls' report."""
    return [(one["call"], one["code"], float(one["count"]), float(one["seconds"]))
            for one in snapshot.get("snapshotter", {}).get("ended", ())]


def _summed(pairs: Iterable[tuple[str, float]]) -> Values:
    found: dict[str, float] = {}
    for name, number in pairs:
        found[name] = found.get(name, 0.0) + number
    return [((name,), number) for name, number in found.items()]


def _peer_sums(snapshot: Snapshot, *kinds: str) -> Values:
    """Sums over the peers that are known."""
    known = snapshot.get("peers", {}).get("peers")
    return [] if known is None else [((kind,), float(sum(one[kind] for one in known))) for kind in kinds]


def _left_alone(snapshot: Snapshot) -> Values:
    known = snapshot.get("peers", {}).get("peers")
    return [] if known is None else [((why,), float(sum(one["away"] == why for one in known)))
                                     for why in ("lied", "gone", "busy")]


def _hits(snapshot: Snapshot) -> Values:
    return _several(("hit", ("fetch", "hits")), ("miss", ("fetch", "misses")))(snapshot)


METRICS: tuple[Metric, ...] = (
    Metric("lazyfs_build_info", GAUGE, ("version",), "1; which lazyfs the worker runs.",
           lambda snapshot: [((snapshot["version"],), 1.0)] if "version" in snapshot else []),
    Metric("lazyfs_ready", GAUGE, (), "Whether the worker serves mounts.", _one("ready")),
    Metric("lazyfs_worker_start_time_seconds", GAUGE, (), "When the worker began, since 1970.", _one("started")),
    Metric("lazyfs_keeper_start_time_seconds", GAUGE, (), "When the keeper began, since 1970; only of a daemon.",
           _one("keeper", "since")),
    Metric("lazyfs_takeovers_total", COUNTER, (),
           "Times that a worker went on for another one (a crash, a hang, an upgrade), since the keeper began.",
           _takeovers),
    Metric("lazyfs_worker_deaths_total", COUNTER, (), "Workers that died of themselves, since the keeper began.",
           _one("keeper", "died")),
    Metric("lazyfs_worker_hangs_total", COUNTER, (), "Workers that the keeper replaced because they hung.",
           _one("keeper", "hung")),
    Metric("lazyfs_mounts", GAUGE, ("state",),
           "Images: attached; detached and still in use; broken: answered with errors until they can be served.",
           _mounts),
    # --- reads
    Metric("lazyfs_reads_total", COUNTER, ("cache",),
           "Reads of image data that reached the worker: answered from the cache at once (hit), or after a wait for a "
           "chunk (miss). What the kernel has in memory does not come here.", _hits),
    Metric("lazyfs_hot_reads_total", COUNTER, (), "Of both: answered out of the image's hot part.",
           _one("fetch", "hot_reads")),
    Metric("lazyfs_read_seconds", HISTOGRAM, (),
           "How long reads took that had to wait for anything; hits are not in it, they take microseconds.",
           lambda _: []),
    Metric("lazyfs_reads_waiting", GAUGE, (), "Reads that wait now.", _one("reads", "waiting")),
    Metric("lazyfs_reads_hung", GAUGE, (), "Of these, those that have waited for more than 10 s.",
           _one("reads", "hung")),
    Metric("lazyfs_read_oldest_wait_seconds", GAUGE, (), "How long the oldest of them has waited; 0: none waits.",
           _one("reads", "oldest_s")),
    Metric("lazyfs_slow_reads_total", COUNTER, (), "Reads that took daemon.slow_read_s or longer (`lazyfs trace`).",
           _one("reads", "slow")),
    Metric("lazyfs_read_errors_total", COUNTER, ("kind",),
           "Requests of the kernel that ended with an error of ours, by its kind: deadline, source, not_found, auth, "
           "integrity, cache, bug, ...", _mapped("reads", "errors")),
    # --- fetching
    Metric("lazyfs_fetched_bytes_total", COUNTER, ("source",),
           "Bytes that came, compressed, repetitions and bad ones included, by the server that sent them; `other`: "
           "all beyond the first 32.", _mapped("fetch", "bytes_by_source")),
    Metric("lazyfs_fetch_requests_total", COUNTER, (), "Range requests sent.", _one("fetch", "requests")),
    Metric("lazyfs_fetch_retries_total", COUNTER, (), "Transfers that were tried again.", _one("fetch", "retries")),
    Metric("lazyfs_fetch_running", GAUGE, ("priority",),
           "Transfers under way: for reads (foreground), ahead of a start (prefetch), ahead of a sequential reader "
           "(background), of a full copy (copy).", _mapped("running")),
    Metric("lazyfs_chunks_in_flight", GAUGE, (), "Chunks that wait or are on their way.", _one("flights")),
    Metric("lazyfs_chunks_fetched_total", COUNTER, (), "Chunks that have come and were right.",
           _one("fetch", "chunks_fetched")),
    Metric("lazyfs_chunks_ahead_total", COUNTER, ("priority",), "Of these, those that nobody had asked for yet.",
           _several(("prefetch", ("fetch", "chunks_prefetched")), ("background", ("fetch", "chunks_read_ahead")),
                    ("copy", ("fetch", "chunks_copied")))),
    Metric("lazyfs_bad_chunks_total", COUNTER, (), "Chunks that came with another digest than promised.",
           _one("fetch", "bad_chunks")),
    Metric("lazyfs_source_state", GAUGE, ("source", "state"),
           "1 for the state that a source is in: ok, failing, down (the breaker is open), probing, paused (it asked "
           "for that), refusing, lying.", _source_states),
    Metric("lazyfs_source_requests_total", COUNTER, ("source",), "Transfers begun from a source.",
           _sources("requests")),
    Metric("lazyfs_source_failures_total", COUNTER, ("source",), "Of these, those that failed.", _sources("failures")),
    Metric("lazyfs_source_outages_total", COUNTER, ("source",), "Times that the breaker opened.", _sources("outages")),
    Metric("lazyfs_hedges_total", COUNTER, (),
           "Requests that were sent to the next mirror as well, because the one before it was late.",
           lambda snapshot: [((), float(sum(one["hedges"] for one in snapshot["servers"])))]
           if "servers" in snapshot else []),
    # --- the cache
    Metric("lazyfs_cache_used_bytes", GAUGE, (), "On disk, by the last look and what was stored since.",
           _one("space", "used_bytes")),
    Metric("lazyfs_cache_quota_bytes", GAUGE, (), "cache.quota_bytes; 0: none.", _one("space", "quota_bytes")),
    Metric("lazyfs_cache_floor_bytes", GAUGE, (), "What is to stay free on its file system.",
           _one("space", "floor_bytes")),
    Metric("lazyfs_cache_disk_size_bytes", GAUGE, (), "Of its file system.", _one("disk", "size_bytes")),
    Metric("lazyfs_cache_disk_free_bytes", GAUGE, (), "Of it, free.", _one("disk", "free_bytes")),
    Metric("lazyfs_cache_evicted_bytes_total", COUNTER, (), "Removed to stay within the limits, or on request.",
           _one("evicted", "bytes")),
    Metric("lazyfs_cache_evicted_devices_total", COUNTER, (), "Layer devices removed so.", _one("evicted", "devices")),
    Metric("lazyfs_cache_chunks_stored_total", COUNTER, (), "Chunks written to disk.", _one("cache", "chunks_stored")),
    Metric("lazyfs_cache_chunks_not_stored_total", COUNTER, (),
           "Chunks that were served from memory instead: no room, or an error of the disk.",
           _one("cache", "chunks_not_stored")),
    Metric("lazyfs_cache_chunks_verified_total", COUNTER, (), "Chunks compared with their checksum.",
           _one("cache", "chunks_verified")),
    Metric("lazyfs_cache_chunks_damaged_total", COUNTER, (), "Of these, those that were damaged, and were dropped.",
           _one("cache", "chunks_damaged")),
    Metric("lazyfs_cache_chunks_unreadable_total", COUNTER, (), "Chunks that the disk did not give back.",
           _one("cache", "chunks_unreadable")),
    Metric("lazyfs_cache_scrubbed_bytes_total", COUNTER, (), "Looked through by the scrub in the background.",
           _one("cache", "scrubbed_bytes")),
    Metric("lazyfs_cache_checkpoint_errors_total", COUNTER, (), "Checkpoints that could not be written.",
           _one("cache", "checkpoint_errors")),
    Metric("lazyfs_cache_troubles", GAUGE, (), "What fails on its disk now (`lazyfs status` says what, and why).",
           _troubles),
    # --- peers
    Metric("lazyfs_source_bytes_total", COUNTER, ("source",),
           "Bytes that came: of registries and their mirrors (registry, compressed), of peers (peer, as they are).",
           _several(("registry", ("fetch", "fetched_stored_bytes")), ("peer", ("fetch", "peer_bytes")))),
    Metric("lazyfs_peer_chunks_total", COUNTER, (), "Of lazyfs_chunks_fetched_total: peers gave them.",
           _one("fetch", "peer_chunks")),
    Metric("lazyfs_peer_members", GAUGE, (), "Members that this node knows, itself included.",
           _one("peers", "membership", "members")),
    Metric("lazyfs_peer_lost_seconds", GAUGE, (), "For how long no tracker (or DNS) has answered; 0: one does.",
           _one("peers", "membership", "lost_s")),
    Metric("lazyfs_peer_requests_total", COUNTER, (), "Requests sent to peers.", _one("peers", "counters", "requests")),
    Metric("lazyfs_peer_hedges_total", COUNTER, (), "Of these, because another one was late.",
           _one("peers", "counters", "hedges")),
    Metric("lazyfs_peer_duplicate_bytes_total", COUNTER, (), "Bytes that came twice, because of that.",
           _one("peers", "counters", "duplicate_bytes")),
    Metric("lazyfs_peer_failures_total", COUNTER, ("kind",),
           "Requests that peers did not answer, or answered with wrong bytes; of the peers that are known now.",
           lambda snapshot: _peer_sums(snapshot, "failures", "busy", "wrong_pieces")),
    Metric("lazyfs_peers_left_alone", GAUGE, ("why",), "Peers that are not asked now.", _left_alone),
    Metric("lazyfs_peer_uploads_total", COUNTER, (), "Requests of peers answered.",
           _one("peers", "uploads", "requests")),
    Metric("lazyfs_peer_uploads_refused_total", COUNTER, (), "Requests of peers sent elsewhere: too many.",
           _one("peers", "uploads", "refused")),
    Metric("lazyfs_peer_uploaded_bytes_total", COUNTER, ("form",),
           "Bytes given to peers: as they are (plain), and as they went (wire).",
           _several(("plain", ("peers", "uploads", "bytes")), ("wire", ("peers", "uploads", "wire_bytes")))),
    Metric("lazyfs_peer_given_chunks_total", COUNTER, ("from",),
           "Chunks asked for by peers: given out of the cache, fetched for them, not to be had.",
           _several(("cache", ("peers", "given", "from_cache")), ("fetched", ("peers", "given", "fetched")),
                    ("lacking", ("peers", "given", "lacking")))),
    Metric("lazyfs_peer_tokens_total", COUNTER, ("what",),
           "Tokens for peers, where there are some: given to this node, not to be had; of peers, refused.",
           _several(("given", ("peers", "tokens", "issued")), ("missing", ("peers", "tokens", "failed")),
                    ("refused", ("peers", "tokens", "refused")))),
    # --- full copies
    Metric("lazyfs_copies_total", COUNTER, ("result",), "Full copies of images: begun, and how they ended.",
           _several(("started", ("copies", "started")), ("completed", ("copies", "completed")),
                    ("failed", ("copies", "failed")))),
    Metric("lazyfs_copied_bytes_total", COUNTER, (), "Of lazyfs_fetched_bytes_total: for full copies.",
           _one("fetch", "copied_stored_bytes")),
    # --- the snapshotter
    Metric("lazyfs_snapshotter_calls_total", COUNTER, ("call", "code"),
           "Calls of containerd that the snapshotter has answered, by gRPC's status; as of some seconds ago.",
           lambda snapshot: [((call, code), count) for call, code, count, _ in _calls(snapshot)]),
    Metric("lazyfs_snapshotter_call_seconds_total", COUNTER, ("call",), "How long they took together.",
           lambda snapshot: _summed((call, seconds) for call, _, _, seconds in _calls(snapshot))),
    Metric("lazyfs_snapshotter_calls_running", GAUGE, (), "Calls that it is answering.",
           _one("snapshotter", "running")),
    # --- the process
    Metric("lazyfs_process_cpu_seconds_total", COUNTER, (), "CPU time of the worker.", _one("process", "cpu_s")),
    Metric("lazyfs_process_resident_memory_bytes", GAUGE, (), "Its memory.", _one("process", "resident_bytes")),
    Metric("lazyfs_process_open_fds", GAUGE, (), "Its descriptors.", _one("process", "descriptors")),
)


def page(snapshot: Snapshot) -> bytes:
    """All that the snapshot knows, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(snapshot))
    return generate_latest(registry)


class _Snapshot(Collector):
    """For prometheus_client: no state of its own, so nothing is kept from one page to the next."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def describe(self) -> Iterable[Family]:
        return ()

    def collect(self) -> Iterator[Family]:
        for metric in METRICS:
            if metric.kind == HISTOGRAM:
                yield from _histogram(metric, self._snapshot.get("reads", {}))
                continue
            make = CounterMetricFamily if metric.kind == COUNTER else GaugeMetricFamily
            family = make(metric.name, metric.text, labels=metric.labels)
            for labels, number in metric.read(self._snapshot):
                family.add_metric(labels, number)
            if family.samples:
                yield family


def _histogram(metric: Metric, reads: Snapshot) -> Iterator[Family]:
    """Of node.observing's counts, which are not cumulative."""
    if "counts" not in reads:
        return
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*(str(float(one)) for one in reads["bounds_s"]), "+Inf"), reads["counts"], strict=True):
        total += count
        buckets.append((bound, total))
    yield HistogramMetricFamily(metric.name, metric.text, buckets=buckets, sum_value=reads["seconds"])


def document() -> str:
    """The table of docs/observability.md."""
    rows = [f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.text} |"
            for one in METRICS]
    return "\n".join(["| metric | kind | labels | what it says |", "|---|---|---|---|", *rows])


if __name__ == "__main__":
    print(document())
