"""
A prefetch list that lies beside an image in its registry, as a plan: which chunks, in which order.

The list is somebody else's, and large: a process of its own (node.listplan) reads it, with bounds on memory and time,
so that the worker's reads do not wait for it. The plan is kept with the image in the cache directory (also that there
is none), and asked for anew after a day: a restart, or a second mount, asks nobody.

    images/<hex of the layer's digest>.plan    JSON: {"asked": seconds since 1970, "chunks": [[device, chunk], ...]}

Layer: node. Who calls: node.prefetching, in a thread (all of it blocks).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lazyfs.errors import DeadlineError, FormatError, HostError, LazyfsError
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.registry import open_source
from lazyfs.registry.referrers import find_list_text
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.node.opening import OpenedImage
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ImageSource

LIST_DEADLINE_S = 10.0         # a start that has not had its list by then is over
_RESOLVE_S = 30.0              # the process of its own; its CPU time is bounded by itself
_KEPT_S = 24 * 3600.0
_PLAN_BYTES_MAX = 16 << 20     # a million chunks
CHUNK_COUNT_MAX = 500_000      # of a plan: half a TiB

Chunks = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class _Kept:
    asked: float
    chunks: Chunks


def find_plan(order: MountOrder, opened: OpenedImage, cache_dir: Path) -> Chunks:
    """
    What a list says to fetch ahead.

    Args:
        order: of the mount.
        opened: the image; its own source is left to the reads.
        cache_dir: where plans are kept.

    Returns: (device, chunk) in order; none: there is no list.

    Raises:
        LazyfsError: it could not be had, or is not of this image.

    """
    path = cache_dir / "images" / f"{opened.layer.digest.hex}.plan"
    kept = _read(path, opened)
    if kept is not None and 0 <= time.time() - kept.asked < _KEPT_S:
        return kept.chunks
    try:
        text = _ask(order, opened)
    except LazyfsError:
        if kept is not None:
            return kept.chunks
        raise
    chunks = [] if text is None else resolve(text, opened)
    _write(path, chunks)
    return chunks


def _ask(order: MountOrder, opened: OpenedImage) -> bytes | None:
    deadline = time.monotonic() + LIST_DEADLINE_S
    source = open_source(order.image, replace(order.registry_options(), request_deadline_s=LIST_DEADLINE_S))
    try:
        document = _manifest(order, source)
        lazy = parse_lazy_manifest(parse_manifest(document.data, document.media_type), order.image)
        if {layer.digest for layer in lazy.layers} != {blob.digest for blob in opened.blobs if not blob.hot}:
            raise FormatError(f"{order.image} names another image by now")
        return find_list_text(source, document.digest, deadline)
    finally:
        source.close()


def _manifest(order: MountOrder, source: ImageSource) -> Document:
    """The image's own; asked for where the order does not bring it."""
    if order.document is None:
        return select_image(source, order.platform)
    data = base64.b64decode(order.document)
    return Document(data, order.document_type, Digest.of(data))


def resolve(text: bytes, opened: OpenedImage) -> Chunks:
    """
    A list's chunks in an image, found by a process of its own. Raises FormatError: it is none, or asks too much.

    Args:
        text: the list, unchecked.
        opened: the image.

    """
    tables = [[table.chunk_size, table.device_size] for _, table in opened.devices]
    head = json.dumps({"erofs": str(opened.erofs_path), "tables": tables}).encode() + b"\n"
    try:
        words = [sys.executable, "-I", "-m", "lazyfs.node.listplan"]
        done = subprocess.run(words, input=head + text, timeout=_RESOLVE_S, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"a prefetch list of {len(text)} bytes was not read in {_RESOLVE_S:.0f} s") from None
    except OSError as error:
        raise HostError(f"no process to read a prefetch list: {error.strerror}") from error
    if done.returncode:
        raise FormatError(done.stderr.decode("utf-8", "replace").strip()[-300:] or "a prefetch list asks too much")
    return _checked(json.loads(done.stdout), opened)


def _checked(chunks: object, opened: OpenedImage) -> Chunks:
    """Raises FormatError unless these are chunks of the image."""
    counts = [table.chunk_count for _, table in opened.devices]
    if not isinstance(chunks, list) or len(chunks) > CHUNK_COUNT_MAX:
        raise FormatError("a prefetch plan that is none")
    found = []
    for one in chunks:
        match one:
            case [int(device), int(chunk)] if 0 <= device < len(counts) and 0 <= chunk < counts[device]:
                found.append((device, chunk))
            case _:
                raise FormatError("a prefetch plan of another image")
    return found


def _read(path: Path, opened: OpenedImage) -> _Kept | None:
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, RecursionError, FormatError):
        with path.open("rb") as file:
            data = json.loads(file.read(_PLAN_BYTES_MAX))
        return _Kept(float(data["asked"]), _checked(data["chunks"], opened))
    return None


def _write(path: Path, chunks: Chunks) -> None:
    """Atomically; a disk that is full costs no more than another question."""
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    with contextlib.suppress(OSError):
        try:
            temporary.write_text(json.dumps({"asked": time.time(), "chunks": chunks}))
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
