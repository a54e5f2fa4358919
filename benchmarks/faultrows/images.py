"""Lazy images of bytes that cannot be compressed, so that what is stored, sent and read are the same bytes."""

from __future__ import annotations

import random
from typing import IO, TYPE_CHECKING

from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layer import write_layer
from benchmarks.imagekit.layout import LayoutWriter
from benchmarks.kit.lazy import convert

if TYPE_CHECKING:
    from benchmarks.kit.registry import Registry
    from benchmarks.session import Session

_PIECE_BYTES = 1 << 24


def random_image(session: Session, name: str, size: int, registry: Registry) -> str:
    """The reference of a lazy image with one file `data` of `size` bytes; made when it is first asked for."""
    layout = session.place.top / f"{name}-layout"
    if not layout.exists():
        tree = session.place.folder(f"{name}-tree")
        draw = random.Random(name)
        with (tree / "data").open("wb") as file:
            for start in range(0, size, _PIECE_BYTES):
                file.write(draw.randbytes(min(_PIECE_BYTES, size - start)))

        def fill(sink: IO[bytes]) -> int:
            return write_layer(tree, sink)

        writer = LayoutWriter(layout)
        writer.finish([writer.add_layer(name, fill, "zstd")], tag=TAG, command=["true"], env=[])
        convert(session.place, f"oci:{layout}:{TAG}", session.near.reference(name, "lazy"), "--quiet")
    return registry.reference(name, "lazy")
