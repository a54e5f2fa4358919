"""
What the snapshotter remembers of lazy images: which snapshot is which image, and where images are mounted.

    <root>/lazy/<snapshot id>.json       a committed bootstrap snapshot whose image was wanted: its digest
    <root>/lazy/<32 hex digits>.image    the reference by which the image with that digest was mounted
    <root>/images/<32 hex digits>        its mount point: one for all its snapshots

A record is written before its image is mounted, and removed before it is unmounted: an image without a record is
nobody's. Records can be lost: digest and reference are then found out again, and the mount is found by its name.

Layer: snapshotter. Who calls: lazy, lazyreconcile. Invariant: nothing here looks at what is mounted on a mount point.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lazyfs.errors import HostError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.lazyhook import LazyLayer

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HEX_DIGITS = 32                 # of a mount point's name: 128 bits, and short options for overlays
_RECORD_BYTES_MAX = 65536


@dataclass(frozen=True, slots=True)
class LazyRecord:
    """One bootstrap snapshot. `name`: the snapshot's; `digest`: of the uncompressed bootstrap layer."""

    snapshot_id: int
    name: str
    digest: str


class LazyRecords:
    """The files. Any thread; two writers of one record are kept apart by lazy."""

    def __init__(self, root: Path) -> None:
        """Raises HostError: the directories cannot be made."""
        self._records = root / "lazy"
        self._images = root / "images"
        try:
            for path in (self._records, self._images):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(f"cannot make {error.filename}: {error.strerror}") from error

    def of(self, bootstrap: LazyLayer) -> LazyRecord | None:
        """The snapshot's record, if it has one that is about it."""
        record = self._read(self._path(bootstrap.snapshot_id))
        return record if record is not None and record.name == bootstrap.name else None

    def all(self) -> list[LazyRecord]:
        """All that can be read."""
        found = [(path, self._read(path)) for path in sorted(self._records.glob("*.json"))]
        return [record for path, record in found if record is not None and path == self._path(record.snapshot_id)]

    def sweep(self, records: list[LazyRecord]) -> None:
        """Keep these and the references of their images; for the start, when nobody writes."""
        wanted = {path for record in records
                  for path in (self._path(record.snapshot_id), self._reference_path(record.digest))}
        for path in self._records.iterdir():
            if path not in wanted:
                path.unlink(missing_ok=True)

    def write(self, record: LazyRecord) -> None:
        """Store. Raises HostError."""
        _write(self._path(record.snapshot_id), json.dumps(asdict(record)))

    def reference(self, digest: str) -> str:
        """By which reference the image was mounted last; "" if that is not known."""
        with contextlib.suppress(OSError, ValueError), self._reference_path(digest).open("rb") as file:
            return file.read(_RECORD_BYTES_MAX).decode()
        return ""

    def write_reference(self, digest: str, image: str) -> None:
        """Store. Raises HostError."""
        _write(self._reference_path(digest), image)

    def remove(self, snapshot_id: int) -> None:
        self._path(snapshot_id).unlink(missing_ok=True)

    def target(self, digest: str) -> Path:
        """Where the image is mounted, whether it is or not."""
        return self._images / digest.partition(":")[2][:_HEX_DIGITS]

    def make_target(self, digest: str) -> Path:
        """The same, and it is there. Raises HostError."""
        path = self.target(digest)
        with contextlib.suppress(FileExistsError):   # mkdir(2) looks at no file system that may hang below
            try:
                os.mkdir(path, 0o700)   # noqa: PTH102
            except FileExistsError:
                raise
            except OSError as error:
                raise HostError(f"cannot make {path}: {error.strerror}") from error
        return path

    def remove_target(self, path: Path) -> None:
        """Remove a mount point, and the reference of its image. Refuses, as rmdir(2), where something is mounted."""
        with contextlib.suppress(OSError):
            (self._records / f"{path.name}.image").unlink(missing_ok=True)
            os.rmdir(path)   # noqa: PTH106

    def targets(self) -> list[Path]:
        """All mount points, of images on record or not."""
        return [self._images / name for name in sorted(os.listdir(self._images))]   # noqa: PTH208 - looks at no entry

    def _path(self, snapshot_id: int) -> Path:
        return self._records / f"{snapshot_id}.json"

    def _reference_path(self, digest: str) -> Path:
        return self._records / f"{self.target(digest).name}.image"

    @staticmethod
    def _read(path: Path) -> LazyRecord | None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            with path.open("rb") as file:
                record = LazyRecord(**json.loads(file.read(_RECORD_BYTES_MAX)))
            known = isinstance(record.snapshot_id, int) and isinstance(record.name, str)
            return record if known and _DIGEST.fullmatch(record.digest) else None
        return None


def _write(path: Path, text: str) -> None:
    """Replace atomically. Not synced: what a power cut takes is found out again. Raises HostError."""
    temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error
