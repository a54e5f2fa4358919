"""
The local memory of which layers were converted to which blobs, and where those were put.

It lets a killed conversion go on where it was (its finished blobs lie at the destination, but no manifest names them
yet) and finds blobs in other repositories of the same registry. One small JSON file a source layer and options below
`$XDG_CACHE_HOME/lazyfs/convert`, written atomically, bounded in number. It is a hint and nothing more: what it says is
used only after the destination has the blob and its tail has the digest told here; it may be deleted at any time, and
where it cannot be written a conversion works all the same.

Who calls: converter.reuse. Layer: converter.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

import msgspec

from lazyfs import shapes
from lazyfs.errors import FormatError
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import LayerBlob

RECORD_COUNT_MAX = 4096
RECORD_BYTES_MAX = 64 * 1024
PLACE_COUNT_MAX = 16
_SUFFIX = ".json"


class _Record(msgspec.Struct, forbid_unknown_fields=True):
    """`check` is over all other fields: a damaged or misplaced file is no record."""

    source: str
    options: str
    diff_id: str
    blob: str
    blob_size: int
    tail: str
    tail_size: int
    places: list[str]
    check: str = ""

    def checksum(self) -> str:
        fields = [getattr(self, name) for name in self.__struct_fields__ if name != "check"]
        return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()


class Journal:
    """Records by source layer and options. Thread-safe: each record is read and written as one whole file."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or default_directory()

    def find(self, source_digest: Digest, options: str) -> tuple[LayerBlob, tuple[str, ...]] | None:
        """The blob of a layer, and the identities of the places it was put at, newest first."""
        path = self._path(source_digest, options)
        try:
            with path.open("rb") as file:
                record = shapes.from_json(file.read(RECORD_BYTES_MAX), _Record)
            blob = _checked_blob(record, source_digest, options)
        except FileNotFoundError:
            return None
        except (OSError, FormatError, msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            self._remove(path)
            return None
        return blob, tuple(record.places)

    def add(self, blob: LayerBlob, place: str) -> None:
        """Remember that `blob` lies at `place` (ImageDestination.identity)."""
        known = self.find(blob.source_digest, blob.options)
        places = list(known[1]) if known is not None and known[0] == blob else []
        if places[:1] == [place]:
            return
        places = [place, *(other for other in places if other != place)][:PLACE_COUNT_MAX]
        record = _Record(
            blob.source_digest.text, blob.options, blob.source_diff_id.text, blob.digest.text, blob.size,
            blob.tail_digest.text, blob.tail_size, places,
        )
        record.check = record.checksum()
        with contextlib.suppress(OSError):
            self._write(self._path(blob.source_digest, blob.options), msgspec.json.encode(record))
            self._prune()

    def _path(self, source_digest: Digest, options: str) -> Path:
        key = hashlib.sha256(f"{source_digest}\n{options}".encode()).hexdigest()
        return self._directory / (key + _SUFFIX)

    def _write(self, path: Path, data: bytes) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self._directory, prefix="tmp-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())   # else a crash may leave an empty file under the final name
            Path(temporary).replace(path)
        except BaseException:
            self._remove(Path(temporary))
            raise

    def _prune(self) -> None:
        """Oldest out, with a tenth of slack, so that this sorts seldom; includes temporary files of the killed."""
        paths = list(self._directory.iterdir())
        if len(paths) > RECORD_COUNT_MAX:
            ages = sorted((path.lstat().st_mtime_ns, path) for path in paths)
            for _, path in ages[: len(paths) - RECORD_COUNT_MAX + RECORD_COUNT_MAX // 10]:
                self._remove(path)

    @staticmethod
    def _remove(path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink()


def _checked_blob(record: _Record, source_digest: Digest, options: str) -> LayerBlob:
    if record.check != record.checksum() or (record.source, record.options) != (source_digest.text, options):
        raise FormatError("damaged or misplaced record of the conversion journal")
    if not 0 < record.tail_size <= record.blob_size:
        raise FormatError("impossible sizes in a record of the conversion journal")
    return LayerBlob(
        Digest(record.blob), record.blob_size, source_digest, Digest(record.diff_id), options,
        Digest(record.tail), record.tail_size,
    )


def default_directory() -> Path:
    """`$XDG_CACHE_HOME/lazyfs/convert`; the variable counts only if absolute (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if base.startswith("/") else Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111 (never raises)
    return root / "lazyfs" / "convert"
