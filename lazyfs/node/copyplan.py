"""
What a full copy of an image fetches, and how much of it is there: by its chunk tables and what the cache has.

Layer: node. Who calls: node.copyrun, node.fullcopy. Pure, but that it looks at what is present now. Bytes are stored
(compressed) bytes: what the link has to carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.fetch.device import FetchDevice

_ITEM = np.dtype([("device", "<u2"), ("index", "<u4")])    # limits: 512 devices, 2^26 chunks


class CopyPlan(Sequence[tuple["FetchDevice", int]]):
    """The missing chunks of an image's devices, in the order in which they lie in its blobs; 6 bytes each."""

    def __init__(self, devices: Iterable[FetchDevice]) -> None:
        self._devices = distinct(devices)
        parts, keys = [], []
        for number, device in enumerate(self._devices):
            missing = np.flatnonzero(~_present(device))
            part = np.empty(len(missing), _ITEM)
            part["device"], part["index"] = number, missing
            rows = device.table.rows[missing]
            parts.append(part)
            keys.append((rows["blob_index"], rows["blob_offset"]))
        items = np.concatenate(parts) if parts else np.empty(0, _ITEM)
        order = np.lexsort((np.concatenate([offset for _, offset in keys]), np.concatenate([blob for blob, _ in keys]))
                           ) if parts else np.empty(0, np.intp)
        self._items = items[order]

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, at: int) -> tuple[FetchDevice, int]: ...

    @overload
    def __getitem__(self, at: slice) -> Sequence[tuple[FetchDevice, int]]: ...

    def __getitem__(self, at: int | slice) -> tuple[FetchDevice, int] | Sequence[tuple[FetchDevice, int]]:
        if isinstance(at, slice):
            return [self[one] for one in range(*at.indices(len(self)))]
        number, index = self._items[at].item()
        return self._devices[number], index


@dataclass(frozen=True, slots=True)
class Share:
    """Of an image's stored bytes: how many are there."""

    present_bytes: int
    total_bytes: int

    @property
    def left_bytes(self) -> int:
        return self.total_bytes - self.present_bytes

    @classmethod
    def of(cls, devices: Iterable[FetchDevice]) -> Share:
        present = total = 0
        for device in distinct(devices):
            sizes = device.table.rows["stored_size"]
            total += int(sizes.sum(dtype=np.int64))
            present += int(sizes[_present(device)].sum(dtype=np.int64))
        return cls(present, total)


def missing_bytes(devices: Iterable[FetchDevice]) -> int:
    """Uncompressed: what the cache's disk will have to take."""
    return sum(int((~_present(device)).sum()) * device.table.chunk_size for device in distinct(devices))


def distinct(devices: Iterable[FetchDevice]) -> list[FetchDevice]:
    """Each layer device once, if an image has one twice."""
    return list({device.cached.digest: device for device in devices}.values())


def _present(device: FetchDevice) -> np.typing.NDArray[np.bool_]:
    return np.frombuffer(device.cached.presence(), np.uint8).astype(np.bool_)
