"""Row 7: conversion from and to a directory against `gzip -dc` of the same layers to /dev/null."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layout import blob_path
from benchmarks.kit.lazy import convert
from benchmarks.kit.proc import run
from benchmarks.session import TENSORFLOW, layer_digests, remove

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session

TITLE = "conversion time against gzip -dc of the same layers"
_GUNZIP_TIMEOUT_S = 300.0


def measure(session: Session) -> list[Figure]:
    layout = session.layout(TENSORFLOW)
    blobs = [blob_path(layout, digest) for digest in layer_digests(layout, TAG)]
    run(["cat", *blobs], timeout_s=_GUNZIP_TIMEOUT_S, discard=True)  # all sides read from the page cache
    theirs: list[float] = []
    ours: dict[str, list[float]] = {"zstd": [], "lz4": []}
    for _ in range(session.runs):
        theirs.append(_gunzip(blobs))
        for codec, times in ours.items():
            times.append(convert_fresh(session, layout, codec))
    return [
        ratio("7a", "convert to zstd, default level", 1.0, ours["zstd"], theirs),
        ratio("7b", "convert to lz4, default level", 1.4, ours["lz4"], theirs),
    ]


def _gunzip(blobs: list[Path]) -> float:
    return run(["gzip", "-dc", *blobs], timeout_s=_GUNZIP_TIMEOUT_S, discard=True).wall_s


def convert_fresh(session: Session, layout: Path, codec: str, *options: str) -> float:
    """Seconds of one conversion, nothing to reuse; the lazy image is left in `converted` (tag `lazy`)."""
    target = session.place.top / "converted"
    remove(target)
    remove(session.place.top / "xdg")  # the journal
    words = ["--codec", codec, *options, "--quiet"]
    return convert(session.place, f"oci:{layout}:{TAG}", f"oci:{target}:lazy", *words).wall_s
