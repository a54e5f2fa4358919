"""
What the mirror knows of registries: manifests they gave, what tags they said, which blobs they let this node have.

Layer: mirror. Who calls: mirror.manifests and mirror.access, in threads. State: one SQLite file, `records.sqlite` in
mirror.dir; a cache: what is damaged is begun anew. A row is of one *place* (registry/repository): what one registry
gave is never served as another's, who might only claim to have it. Times are time.time(), for they outlive restarts; a
time that is yet to come (the clock was set back) counts as long ago.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from lazyfs.errors import CacheError
from lazyfs.image.digest import Digest
from lazyfs.limits import MIB
from lazyfs.registry.place import Document

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

MANIFEST_BYTES_KEPT: Final = 256 * MIB     # 50,000 manifests of the usual 5 KiB
ROW_COUNT_MAX: Final = 200_000             # of tags, and of blobs: 100 bytes each
_TIDY_EVERY: Final = 256                   # writes
_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE manifest (place TEXT, digest TEXT, kind TEXT, data BLOB, proven REAL, PRIMARY KEY (place, digest));
CREATE TABLE tag (place TEXT, tag TEXT, digest TEXT, proven REAL, PRIMARY KEY (place, tag)) WITHOUT ROWID;
CREATE TABLE blob (place TEXT, digest TEXT, size INTEGER, proven REAL, is_shown INTEGER, PRIMARY KEY (place, digest))
    WITHOUT ROWID;
"""
_LISTED: Final = ("INSERT INTO blob VALUES (?,?,?,?,0) ON CONFLICT DO UPDATE SET proven=max(proven, excluded.proven) "
                  "WHERE is_shown=0 AND size=excluded.size")
_log = logging.getLogger("lazyfs.mirror")


class KnownManifest(NamedTuple):
    """`age_s`: since the registry last let us have it."""

    document: Document
    age_s: float


class KnownTag(NamedTuple):
    digest: Digest
    age_s: float


class KnownBlob(NamedTuple):
    """
    A blob that a registry says it has.

    `is_shown`: it has shown so, by bytes of it; else it only listed it in a manifest, or answered HEAD.
    """

    size: int
    age_s: float
    is_shown: bool


class Records:
    """Thread-safe; each call is some microseconds, and the disk's when it writes."""

    def __init__(self, path: Path) -> None:
        """
        Open, or make anew.

        Raises:
            CacheError: neither is possible.

        """
        self._path = path
        self._lock = threading.Lock()
        self._write_count = 0
        try:
            self._base = self._open()
        except (sqlite3.Error, OSError) as error:
            _log.warning("%s cannot be used, and is begun anew: %s", path, error)
            try:
                for one in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                    one.unlink(missing_ok=True)
                self._base = self._open()
            except (sqlite3.Error, OSError) as again:
                raise CacheError(f"{path}: cannot be used: {again}", hint="set mirror.dir to a local disk") from again

    def _open(self) -> sqlite3.Connection:
        base = sqlite3.connect(self._path, check_same_thread=False, timeout=10.0)
        try:
            base.execute("PRAGMA journal_mode=WAL")
            base.execute("PRAGMA synchronous=NORMAL")     # a power cut may cost the last rows, nothing else
            version = base.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                base.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"of version {version}, expected {_VERSION}")   # noqa: TRY301 - as if it said so
        except BaseException:
            base.close()
            raise
        return base

    def close(self) -> None:
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._base.close()

    # --- reading --------------------------------------------------------------------------------------------------

    def manifest(self, place: str, digest: Digest) -> KnownManifest | None:
        row = self._one("SELECT kind, data, proven FROM manifest WHERE place=? AND digest=?", place, digest.text)
        if row is None or Digest.of(row[1]) != digest:
            return None
        return KnownManifest(Document(row[1], row[0], digest), _age(row[2]))

    def tag(self, place: str, tag: str) -> KnownTag | None:
        row = self._one("SELECT digest, proven FROM tag WHERE place=? AND tag=?", place, tag)
        return None if row is None else KnownTag(Digest(row[0]), _age(row[1]))

    def blob(self, place: str, digest: Digest) -> KnownBlob | None:
        row = self._one("SELECT size, proven, is_shown FROM blob WHERE place=? AND digest=?", place, digest.text)
        return None if row is None else KnownBlob(row[0], _age(row[1]), bool(row[2]))

    def places(self, age_s: float, count: int) -> list[str]:
        """Repositories of which a tag was resolved in the last `age_s`, the latest first."""
        query = "SELECT place FROM tag WHERE proven>? GROUP BY place ORDER BY max(proven) DESC LIMIT ?"
        try:
            with self._lock:
                return [row[0] for row in self._base.execute(query, (time.time() - age_s, count))]
        except sqlite3.Error as error:
            _log.warning("%s: not read: %s", self._path, error)
            return []

    def _one(self, query: str, *values: object) -> tuple[Any, ...] | None:
        try:
            with self._lock:
                found: tuple[Any, ...] | None = self._base.execute(query, values).fetchone()
        except sqlite3.Error as error:
            _log.warning("%s: not read: %s", self._path, error)
            return None
        return found

    # --- writing --------------------------------------------------------------------------------------------------

    def keep_manifest(self, place: str, document: Document, listed: Iterable[tuple[Digest, int]]) -> None:
        """The registry gave a manifest that lists these (digest, size)."""
        now = time.time()
        rows = [(place, digest.text, size, now) for digest, size in listed]
        self._write([
            ("INSERT OR REPLACE INTO manifest VALUES (?,?,?,?,?)",
             [(place, document.digest.text, document.media_type, document.data, now)]),
            (_LISTED, rows),
        ])

    def prove_manifest(self, place: str, digest: Digest) -> None:
        """The registry would still give it."""
        self._write([("UPDATE manifest SET proven=? WHERE place=? AND digest=?",
                      [(time.time(), place, digest.text)])])

    def keep_tag(self, place: str, tag: str, digest: Digest) -> None:
        self._write([("INSERT OR REPLACE INTO tag VALUES (?,?,?,?)", [(place, tag, digest.text, time.time())])])

    def keep_blob(self, place: str, digest: Digest, size: int, *, is_shown: bool) -> None:
        """The registry let us have it, or (not `is_shown`) says that it would."""
        self._write([("INSERT OR REPLACE INTO blob VALUES (?,?,?,?,?)",
                      [(place, digest.text, size, time.time(), int(is_shown))])])

    def forget(self, place: str, digest: Digest) -> None:
        """The registry has it no more, or not for us."""
        key = [(place, digest.text)]
        self._write([("DELETE FROM manifest WHERE place=? AND digest=?", key),
                     ("DELETE FROM blob WHERE place=? AND digest=?", key),
                     ("DELETE FROM tag WHERE place=? AND digest=?", key)])

    def forget_tag(self, place: str, tag: str) -> None:
        self._write([("DELETE FROM tag WHERE place=? AND tag=?", [(place, tag)])])

    def _write(self, statements: Sequence[tuple[str, Sequence[tuple[object, ...]]]]) -> None:
        """All of them or none. A disk that is full costs the memory of it, not the answer."""
        try:
            with self._lock, self._base:
                for text, rows in statements:
                    self._base.executemany(text, rows)
                self._write_count += 1
                if self._write_count % _TIDY_EVERY == 0:
                    self._tidy()
        except sqlite3.Error as error:
            _log.warning("%s: not written: %s", self._path, error)

    def _tidy(self) -> None:
        for table in ("tag", "blob"):
            count = self._base.execute(f"SELECT count(*) FROM {table}").fetchone()[0]   # noqa: S608 - a name of ours
            if count > ROW_COUNT_MAX:
                limit = self._base.execute(f"SELECT proven FROM {table} ORDER BY proven LIMIT 1 OFFSET ?",  # noqa: S608
                                           (count - ROW_COUNT_MAX * 3 // 4,)).fetchone()[0]
                self._base.execute(f"DELETE FROM {table} WHERE proven<?", (limit,))     # noqa: S608
        total = 0
        for rowid, size in self._base.execute(
                "SELECT rowid, length(data) FROM manifest ORDER BY proven DESC").fetchall():
            total += size
            if total > MANIFEST_BYTES_KEPT:
                self._base.execute("DELETE FROM manifest WHERE rowid=?", (rowid,))


def _age(proven: float) -> float:
    age_s = time.time() - proven
    return age_s if age_s >= -1.0 else float("inf")
