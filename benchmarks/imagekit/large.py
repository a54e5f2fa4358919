"""The image for measuring the converter's memory: one layer of 2 GB, made of a real tree and altered copies."""

from __future__ import annotations

import os
import shutil
from typing import IO, TYPE_CHECKING

from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layer import write_layer
from benchmarks.imagekit.layout import LayoutWriter
from benchmarks.kit.proc import run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace

LAYER_BYTES_MIN = 2_000_000_000
_ALTER = bytes(value ^ 0x55 for value in range(256))  # other bytes, as compressible as before
_COPY_TIMEOUT_S = 300.0


def build_large(folder: Path, tree: Callable[[], Path], place: Workspace, say: Callable[[str], None]) -> Path:
    """Return `folder/large`, made if it is not there. `tree` gives a real root file system on the workspace's disk."""
    layout = folder / "large"
    if layout.exists():
        return layout
    say("building an image with one layer of 2 GB")
    top = place.top / "large-tree"
    run(["cp", "-al", tree(), top], timeout_s=_COPY_TIMEOUT_S)  # hard links: nothing is copied
    sizes = {path: path.lstat().st_size for path in top.rglob("*") if path.is_file() and not path.is_symlink()}
    missing = LAYER_BYTES_MIN - sum(sizes.values())
    extra = top / "altered"
    extra.mkdir()
    for number, path in enumerate(sorted(sizes, key=lambda path: (-sizes[path], path))):
        if missing <= 0:
            break
        (extra / str(number)).write_bytes(path.read_bytes().translate(_ALTER))
        missing -= sizes[path]

    def fill(sink: IO[bytes]) -> int:
        return write_layer(top, sink)

    work = folder / f".large-{os.getpid()}"
    try:
        writer = LayoutWriter(work)
        layer = writer.add_layer("one large layer", fill)
        writer.finish([layer], tag=TAG, command=["true"], env=[])
        work.rename(layout)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(top)
    return layout
