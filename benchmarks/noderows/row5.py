"""
Row 5: Prepare, Mounts and Remove of an ordinary snapshot over gRPC; containerd's overlayfs beside it.

The client is containerd's own, in Go (benchmarks/go/snapshotrpc), as containerd calls a snapshotter. One in Python, in
turns with it, shows what of the time is the client's: on a noisy machine nothing that could be told.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import grpc

from benchmarks.figures import Figure, plain
from benchmarks.kit.goprogram import go_program
from benchmarks.kit.node import Node
from benchmarks.kit.proc import run
from snapshotter.api import snapshots_pb2, snapshots_pb2_grpc

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "snapshotter: Prepare + Mounts + Remove of an ordinary snapshot, p50"
_CALLS_PER_RUN = 200
_TIMEOUT_S = 10.0
_KEPT = {"containerd.io/gc.root": "benchmark"}   # containerd's own service would collect it between two calls


def measure(session: Session) -> list[Figure]:
    times: dict[str, list[float]] = {"ours": [], "theirs": [], "ours, Python": [], "theirs, Python": []}
    with Node(session.place) as node:
        for _ in range(session.runs):
            for suffix, client in (("", _p50_ms), (", Python", _p50_by_python_ms)):
                times[f"theirs{suffix}"].append(
                    client(node.containerd.socket, "overlayfs", node.containerd.namespace))
                times[f"ours{suffix}"].append(client(node.socket, "", ""))
    return [
        plain("5", f"p50 of {_CALLS_PER_RUN}", 5.0, "ms", times["ours"]),
        plain("5-overlayfs", "the same by containerd's own service and its overlayfs", None, "ms", times["theirs"]),
        plain("5-python", "ours, asked by a client in Python", None, "ms", times["ours, Python"]),
        plain("5-overlayfs-python", "overlayfs, asked by a client in Python", None, "ms", times["theirs, Python"]),
    ]


def _p50_ms(socket: Path, snapshotter: str, namespace: str) -> float:
    """Median milliseconds of the three calls together."""
    words: list[str | Path] = [go_program("snapshotrpc"), socket, snapshotter, namespace, str(_CALLS_PER_RUN)]
    return statistics.median(map(float, run(words, timeout_s=_CALLS_PER_RUN * _TIMEOUT_S).stdout.split()))


def _p50_by_python_ms(socket: Path, snapshotter: str, namespace: str) -> float:
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
