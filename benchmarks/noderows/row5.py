"""Row 5: Prepare, Mounts and Remove of an ordinary snapshot over gRPC; containerd's overlayfs beside it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import grpc

from benchmarks.figures import Figure, plain
from benchmarks.kit.node import Node
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "snapshotter: Prepare + Mounts + Remove of an ordinary snapshot, p50"
_CALLS_PER_RUN = 200
_TIMEOUT_S = 10.0
_KEPT = {"containerd.io/gc.root": "benchmark"}   # containerd's own service would collect it between two calls


def measure(session: Session) -> list[Figure]:
    ours, theirs = [], []
    with Node(session.place) as node:
        for _ in range(session.runs):
            theirs.append(_p50_ms(node.containerd.socket, "overlayfs", node.containerd.namespace))
            ours.append(_p50_ms(node.socket, "", ""))
    return [
        plain("5", f"p50 of {_CALLS_PER_RUN}", 5.0, "ms", ours),
        plain("5-overlayfs", "the same by containerd's own service and its overlayfs", None, "ms", theirs),
    ]


def _p50_ms(socket: Path, snapshotter: str, namespace: str) -> float:
    """Median milliseconds of the three calls together."""
    metadata = [("containerd-namespace", namespace)] if namespace else []
    times = []
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        stub = snapshots_pb2_grpc.SnapshotsStub(channel)
        for number in range(_CALLS_PER_RUN):
            key = f"bench-{time.monotonic_ns()}-{number}"
            options = {"timeout": _TIMEOUT_S, "metadata": metadata}
            begin = time.perf_counter()
            stub.Prepare(
                snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, labels=_KEPT), **options
            )
            stub.Mounts(snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key), **options)
            stub.Remove(snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key), **options)
            times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times)
