"""
An image's layers become snapshots, in the order and with the words of containerd's own unpacker.

Layer: snapshotter, above containerd. Who calls: snapshotter.pull. For each layer, lowest first: Prepare an extraction
snapshot that says for which chain id it is. AlreadyExists: the snapshotter has it, or serves it lazily, and nothing is
fetched. Else the layer's content is applied to it, its diff-id compared, and it is committed under its chain id.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import TYPE_CHECKING, Final

from lazyfs.errors import HostError, IntegrityError, LazyfsError, SourceError
from snapshotter.pullimage import is_lazy_blob, snapshot_labels

if TYPE_CHECKING:
    from collections.abc import Callable

    from snapshotter.containerd import Containerd
    from snapshotter.model import Mount
    from snapshotter.pullimage import PullImage

_TRIES: Final = 3                # as containerd's: between AlreadyExists and Stat somebody may have removed it


def first_missing(client: Containerd, snapshotter: str, image: PullImage) -> int:
    """Number of the lowest layer without a snapshot: those below it have one, as one cannot be without its parent."""
    names = image.chain_ids
    if client.snapshot(snapshotter, names[-1]) is not None:
        return len(names)
    low, high = 0, len(names) - 1
    while low < high:
        middle = (low + high) // 2
        if client.snapshot(snapshotter, names[middle]) is None:
            high = middle
        else:
            low = middle + 1
    return low


def held_layers(client: Containerd, snapshotter: str, image: PullImage) -> int:
    """How many layers, from the lowest, have snapshots; these are held by the client's lease from now on."""
    count = first_missing(client, snapshotter, image)
    if count:
        top = image.chain_ids[count - 1]
        client.hold(f"snapshots/{snapshotter}", top)     # and what is below it
        if client.snapshot(snapshotter, top) is None:    # collected in this moment
            return 0
    return count


class Unpacker:
    """Unpacks one image. `wait_content(place)` returns when the content of that layer is in containerd."""

    def __init__(self, client: Containerd, snapshotter: str, image: PullImage,
                 wait_content: Callable[[int], None]) -> None:
        self._client = client
        self._snapshotter = snapshotter
        self._image = image
        self._wait_content = wait_content

    def unpack(self, first: int, applied: Callable[[int], None]) -> None:
        """
        All layers from number `first` on; `applied` is told each that was unpacked.

        Raises:
            HostError: the snapshotter is not there, or does not serve lazy images. IntegrityError: a layer has another
            diff-id than the config says. SourceError: containerd refuses.

        """
        for place in range(first, len(self._image.layers)):
            key, mounts = self._prepare(place)
            if mounts is None:
                continue
            try:
                self._fill(place, key, mounts)
            except BaseException:
                with contextlib.suppress(LazyfsError):
                    self._client.remove_snapshot(self._snapshotter, key)
                raise
            applied(place)

    def _prepare(self, place: int) -> tuple[str, list[Mount] | None]:
        """Key and mounts of the extraction snapshot; None: this layer's snapshot is there."""
        name = self._image.chain_ids[place]
        parent = self._image.chain_ids[place - 1] if place else ""
        labels = snapshot_labels(self._image.layers[place], name)
        for _ in range(_TRIES):
            key = f"extract-{time.time_ns() % 10**9}-{secrets.token_urlsafe(3)} {name}"
            mounts = self._client.prepare(self._snapshotter, key, parent, labels)
            if mounts is not None:
                return key, mounts
            # The next layer's Prepare says whether this one is there; only the last has none above it.
            if place < len(self._image.layers) - 1 or self._client.snapshot(self._snapshotter, name) is not None:
                return key, None
        raise SourceError(f"snapshotter {self._snapshotter}: it has {name}, and has it not",
                          hint="look at the snapshotter's log")

    def _fill(self, place: int, key: str, mounts: list[Mount]) -> None:
        layer, name = self._image.layers[place], self._image.chain_ids[place]
        if is_lazy_blob(layer):
            raise HostError(f"snapshotter {self._snapshotter} does not serve lazy images",
                            hint="pull with --snapshotter lazyfs, or pull the source image")
        self._wait_content(place)
        found = self._client.apply(layer, mounts)
        if found != self._image.diff_ids[place]:
            raise IntegrityError(f"layer {layer.digest.short}: diff-id {found.short}, the config says "
                                 f"{self._image.diff_ids[place].short}")
        if not self._client.commit(self._snapshotter, name, key, snapshot_labels(layer, name)):
            self._client.remove_snapshot(self._snapshotter, key)      # somebody else was quicker
