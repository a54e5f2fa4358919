"""Row 8: the lazy image's size against the gzip image's: the sum of the layers in the manifests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.imagekit.build import TAG
from benchmarks.rows.row7 import convert_fresh
from benchmarks.session import TENSORFLOW, layers_bytes

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "the lazy image's size against the gzip image"


def measure(session: Session) -> list[Figure]:
    layout = session.layout(TENSORFLOW)
    theirs = layers_bytes(layout, TAG) / 1e6
    figures = []
    for key, codec, target in (("8a", "zstd", 0.92), ("8b", "lz4", 1.10)):
        sizes = []
        for _ in range(session.runs):  # the same every time: conversion is deterministic
            convert_fresh(session, layout, codec)
            sizes.append(layers_bytes(session.place.top / "converted", "lazy") / 1e6)
        figures.append(ratio(key, f"size in MB, {codec}, default level", target, sizes, [theirs] * len(sizes)))
    return figures
