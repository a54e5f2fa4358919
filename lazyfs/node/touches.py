"""
What a worker tells of its recorders, and mounts that are read finely for a while: a page at a time, as long as a
connection asks for it.

Layer: node. Who calls: node.control, for TOUCHED. On the trio thread. State: what the read-ahead was before. Nobody
else changes it meanwhile: drivers.set_read_ahead leaves a mount at one page alone, node.worker asks is_fine(). A worker
that dies leaves it so.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from lazyfs.errors import TargetError
from lazyfs.fs import drivers, mountapi

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.node.mounted import MountedImage


class Touches:
    """Of one worker. `find`: the image mounted on a target."""

    def __init__(self, find: Callable[[str], MountedImage | None]) -> None:
        self._find = find
        self._before: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def touched(self, target: str, start: int = 0) -> dict[str, Any]:
        """
        What was read through a mount: see Recorder.page, which gives the touches from number `start` on.

        `devices`: their digests, in the order in which touches number them; `unseen`: numbers of those that the kernel
        reads past us. `read_ahead_kib`: 0: not known. Raises TargetError: not mounted by us.

        """
        mounted = self._mounted_on(target)
        return {
            "devices": [str(digest) for digest, _ in mounted.opened.devices],
            "unseen": [number for number, index in enumerate(mounted.device_indexes) if index < 0],
            "read_ahead_kib": drivers.read_ahead_kib(_bdi_names(mounted)),
            **mounted.recorder.page(max(0, start)),
        }

    def read_finely(self, target: str) -> list[str]:
        """Until end_fine() with what this returns, the kernel reads nothing ahead there. Raises as touched()."""
        names = _bdi_names(self._mounted_on(target))
        for name in names:
            self._counts[name] += 1
            if name not in self._before:
                with contextlib.suppress(OSError):
                    file = drivers.BDI_DIR / name / "read_ahead_kb"
                    before = file.read_text(encoding="ascii").strip()
                    if before != str(drivers.READ_AHEAD_RECORDING_KIB):   # else it was made to be recorded
                        file.write_text(str(drivers.READ_AHEAD_RECORDING_KIB), encoding="ascii")
                        self._before[name] = before
        return names

    def is_fine(self, names: list[str]) -> bool:
        """Whether one of these is read finely now: its read-ahead is not to be changed."""
        return any(self._counts[name] > 0 for name in names)

    def end_fine(self, names: list[str]) -> None:
        """One less wants it; after the last one the read-ahead is what it was."""
        for name in names:
            self._counts[name] -= 1
            if self._counts[name] > 0:
                continue
            del self._counts[name]
            before = self._before.pop(name, None)
            if before is not None:
                with contextlib.suppress(OSError):   # unmounted meanwhile
                    (drivers.BDI_DIR / name / "read_ahead_kb").write_text(before, encoding="ascii")

    def _mounted_on(self, target: str) -> MountedImage:
        mounted = self._find(target)
        if mounted is None:
            raise TargetError(f"{target} is not mounted by this worker")
        return mounted


def _bdi_names(mounted: MountedImage) -> list[str]:
    """Driver fuse: that of all images of this worker."""
    entry = mountapi.mount_at(mounted.order.target) if mounted.driver is drivers.Driver.FUSE else None
    return mounted.bdi_names if entry is None else [entry.device]
