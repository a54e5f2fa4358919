"""
What a lazy mount was asked for, as a Recording; and the image's files, to name it by.

Layer: runner. Who calls: runner.session, while the mount is there. This is the one place that knows how the worker
tells (node.recorder).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from lazyfs import __version__
from lazyfs.errors import TargetError
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder
from lazyfs.node.protocol import TOUCHED, ControlClient, WorkerGoneError
from lazyfs.node.rundir import find_record
from lazyfs.profile.files import ImageFiles
from lazyfs.profile.recording import Recording, Touch

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.image.erofs import ErofsImage
    from lazyfs.image.table import ChunkTable
    from lazyfs.node.rundir import MountRecord

_ANSWER_S = 30.0                 # of the worker
TOOL = f"lazyfs {__version__}"


@dataclass(frozen=True, slots=True)
class MountedTables:
    """What the bootstrap of a mounted image says: its tree, and its layer devices."""

    tree: ErofsImage
    devices: tuple[tuple[Digest, ChunkTable], ...]

    @classmethod
    def of(cls, target: str) -> Self:
        """
        Of what is mounted on `target`, out of the cache that serves it.

        Raises:
            TargetError: no lazyfs mount. LazyfsError: the cache is damaged.

        """
        record = _record(target)
        layer = (record.bootstrap, record.layer_size, record.raw_size)
        order = replace(MountOrder.from_json(record.order), layer=layer, checked=True, seed=None, document=None)
        opened = open_image(order, Path(record.cache_dir), offline=True)
        try:
            return cls(opened.tree, opened.devices)
        finally:
            opened.close()

    @property
    def files(self) -> ImageFiles:
        """To turn recordings into lists of files."""
        return ImageFiles(self.tree, [table for _, table in self.devices], [str(digest) for digest, _ in self.devices])


def recording_of(target: str, image: str, container: str = "") -> Recording:
    """
    What was read through the mount on `target` until now.

    Args:
        target: absolute, resolved.
        image: the name to record, with its digest where it has one.
        container: who read, likewise.

    Raises:
        TargetError: no lazyfs mount, or its worker is gone. LazyfsError: what the worker answers.

    """
    rows, last = _ask(target)   # first: the program goes on
    tables = MountedTables.of(target)
    devices = {str(digest): table.device_size for digest, table in tables.devices}   # one layer may be there twice
    numbers = [list(devices).index(digest) for digest in last["devices"]]
    touches = tuple(Touch(numbers[device], start, end, time_us / 1000, 0 if container else caller)
                    for device, start, end, time_us, caller in rows)
    containers = (container,) if container else tuple(last["callers"]) or ("",)
    return Recording(image, TOOL, tuple(devices.items()), containers, touches, truncated=bool(last["truncated"]))


def _ask(target: str) -> tuple[list[list[int]], dict[str, Any]]:
    """All touches (see Recorder.page), and the last answer."""
    directory = find_record(target)
    gone = TargetError(f"{target}: the worker of this mount is gone", hint="see its log in /run/lazyfs, and try again")
    if directory is None:
        raise gone
    try:
        with ControlClient.connect(directory[0].socket) as client:
            rows: list[list[int]] = []
            while True:
                answer: dict[str, Any] = client.request(TOUCHED, _ANSWER_S, target=target, start=len(rows))
                rows += answer["touches"]
                if answer["next"] is None:
                    return rows, answer
    except WorkerGoneError as error:
        raise gone from error


def _record(target: str) -> MountRecord:
    found = find_record(target)
    if found is None:
        raise TargetError(f"{target} is not a lazyfs mount")
    return found[1]
