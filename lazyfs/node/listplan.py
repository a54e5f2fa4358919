"""
Read a prefetch list and say which chunks of an image it means: `python -m lazyfs.node.listplan`, a process of its own.

Lists beside images are hostile, and reading one takes a second of CPU time that the worker's reads would wait for. What
this process may use is bounded by the kernel (_MEMORY_BYTES, _CPU_S); it reads the EROFS image, which was checked
before, and writes nothing.

Layer: node. Who calls: node.listed. stdin: a line of JSON {"erofs": path, "tables": [[chunk size, device size], ...]},
then the list. stdout: JSON [[device, chunk], ...], in the list's order, at most CHUNK_COUNT_MAX. Exit code 1: one line
on stderr says what is wrong with the list.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
from itertools import islice
from pathlib import Path

_MEMORY_BYTES = 2 << 30    # of address space: the image (mapped), its tree, the list
_CPU_S = 20                # tensorflow's list, 1 MB: one second


def main() -> int:
    """See the module."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    os.nice(10)    # a start has better things to do
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy as np  # noqa: PLC0415 - within the bounds

    from lazyfs.errors import LazyfsError  # noqa: PLC0415
    from lazyfs.image.codec import Codec  # noqa: PLC0415
    from lazyfs.image.erofs.reader import ErofsImage  # noqa: PLC0415
    from lazyfs.image.prefetch import chunks_of, parse_prefetch, wanted_extents  # noqa: PLC0415
    from lazyfs.image.table import ROW, ChunkTable  # noqa: PLC0415
    from lazyfs.node.listed import CHUNK_COUNT_MAX  # noqa: PLC0415

    head = json.loads(sys.stdin.buffer.readline())
    row = np.zeros((), ROW)
    row["codec"] = Codec.NONE     # which chunks are zeros is known to the worker, and skipped there
    tables = [ChunkTable(chunk, size, np.broadcast_to(row, -(-size // chunk))) for chunk, size in head["tables"]]
    try:
        wanted = parse_prefetch(sys.stdin.buffer.read())
        with Path(head["erofs"]).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        tree = ErofsImage.parse(mapped, [table.device_size for table in tables])
        chunks = dict.fromkeys(islice(chunks_of(wanted_extents(wanted, tree, tables, []), tables), CHUNK_COUNT_MAX))
    except (LazyfsError, MemoryError) as error:
        print(str(error)[:200] or type(error).__name__, file=sys.stderr)
        return 1
    json.dump(list(chunks), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
