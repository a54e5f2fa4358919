"""
The records of all snapshots: one SQLite database, in WAL mode, one short transaction a call.

Layer: snapshotter, above model. Who calls: core only.

    snapshots   one row each; `id` names its directory and is never used twice; `parent` is the id of the parent
    goodbyes    committed bootstraps that were removed: their lazy image is still to be let go

Invariants: names are unique; a parent is committed and outlives its children; a row's directory was made before the row
(core); a row and its goodbye change places in one transaction. Nothing here touches files or mounts, so no
transaction can wait for one. One connection, one lock: calls take well below a millisecond, but for a sync.

What a snapshot is must not be older than what containerd knows of it after a power cut: insert and commit sync.
Removals and labels do not: a snapshot that comes back is one that containerd no longer knows; its collector removes it.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lazyfs.errors import DiskFullError, HostError
from snapshotter.failures import SnapshotExistsError, SnapshotInvalidError, SnapshotMissingError, SnapshotStateError
from snapshotter.lazyhook import LayerKind
from snapshotter.model import Kind, SnapshotInfo, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

NO_USAGE = Usage(0, 0)
VERSION = 1                      # PRAGMA user_version
NAME_BYTES_MAX = 32 * 1024       # of a snapshot; containerd's own database takes no longer one
_BUSY_TIMEOUT_S = 10.0           # somebody looks at the database with another program
_LOG_PAGES = 256                 # then the log begins anew: a sync of a file that grows takes twice as long
_SCHEMA = """
CREATE TABLE snapshots (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    name    TEXT NOT NULL UNIQUE,
    parent  INTEGER REFERENCES snapshots(id),
    kind    TEXT NOT NULL,
    layer   TEXT NOT NULL,
    created INTEGER NOT NULL,
    updated INTEGER NOT NULL,
    labels  TEXT NOT NULL,
    origin  TEXT NOT NULL,
    size    INTEGER NOT NULL DEFAULT 0,
    inodes  INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX children ON snapshots(parent);
CREATE TABLE goodbyes (id INTEGER PRIMARY KEY, name TEXT NOT NULL, labels TEXT NOT NULL);
"""
_COLUMNS = ("s.id, s.name, coalesce(p.name, ''), s.kind, s.layer, s.created, s.updated, s.labels, s.origin, s.size, "
            "s.inodes")
_FROM = " FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent "
_CHAIN = f"""
WITH RECURSIVE chain(id, depth) AS (
    SELECT id, 0 FROM snapshots WHERE name = ?
    UNION ALL
    SELECT b.parent, depth + 1 FROM chain JOIN snapshots b ON b.id = chain.id WHERE b.parent IS NOT NULL)
SELECT {_COLUMNS} FROM chain JOIN snapshots s ON s.id = chain.id LEFT JOIN snapshots p ON p.id = s.parent
ORDER BY chain.depth
"""   # noqa: S608 - constants only
_USED = """
WITH RECURSIVE above(id) AS (
    SELECT value FROM json_each(?)
    UNION
    SELECT s.id FROM above JOIN snapshots s ON s.parent = above.id)
SELECT 1 FROM above JOIN snapshots s ON s.id = above.id WHERE s.kind <> ? LIMIT 1
"""


@dataclass(frozen=True, slots=True)
class Record:
    """
    A snapshot as it is stored.

    Attributes:
        origin: the labels that it was made with, of Prepare and Commit, for lazy layers only: what a layer is does not
            change when somebody replaces its labels.
        usage: of committed snapshots.

    """

    id: int
    info: SnapshotInfo
    layer: LayerKind = LayerKind.ORDINARY
    origin: Mapping[str, str] = field(default_factory=dict)
    usage: Usage = NO_USAGE


@dataclass(frozen=True, slots=True)
class Goodbye:
    """A removed bootstrap whose image is still to be let go."""

    id: int
    name: str
    labels: Mapping[str, str]


class Records:
    """All snapshots by name. Every method is one transaction; all may be called from any thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Records:
        """
        Open the database, or make it.

        Raises:
            HostError: it cannot be read, or a later version has written it.
            DiskFullError: no room.

        """
        with _translated(f"the records in {path}"):
            connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA foreign_keys=ON")
                connection.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                _check_version(path, version)
                if version < VERSION:   # 0: just made; one transaction, so that a kill leaves nothing or all
                    connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;")
            except BaseException:
                connection.close()
                raise
        return cls(connection)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def get(self, name: str) -> Record:
        """Raises SnapshotMissingError."""
        rows = self._read(f"SELECT {_COLUMNS}{_FROM}WHERE s.name = ?", name)
        if not rows:
            raise _missing(name)
        return _record(rows[0])

    def chain(self, name: str) -> list[Record]:
        """The snapshot and all below it, top first. Raises SnapshotMissingError."""
        rows = self._read(_CHAIN, name)
        if not rows:
            raise _missing(name)
        return [_record(row) for row in rows]

    def all(self) -> list[Record]:
        """Every snapshot, by name."""
        return [_record(row) for row in self._read(f"SELECT {_COLUMNS}{_FROM}ORDER BY s.name")]

    def in_use(self, ids: Iterable[int]) -> bool:
        """Whether an active snapshot or a view stands on one of these, or is one."""
        return bool(self._read(_USED, json.dumps(list(ids)), Kind.COMMITTED.value))

    def ids(self) -> set[int]:
        return {row[0] for row in self._read("SELECT id FROM snapshots")}

    def last_id(self) -> int:
        """The largest id that ever was given; 0 if none."""
        rows = self._read("SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'")
        return int(rows[0][0]) if rows else 0

    def insert(self, record: Record) -> Record:
        """
        Add a snapshot below its parent; the times are set here.

        Raises:
            SnapshotExistsError: the name is taken.
            SnapshotMissingError: no such parent.
            SnapshotInvalidError: the parent is not committed; the name is empty or too long.

        """
        now = time.time_ns()
        info = replace(record.info, labels=_kept(record.info.labels), created=now, updated=now)
        _check_name(info.name)
        with self._transaction(sync=True) as run:
            parent = parent_of(run, info.parent)
            try:
                run("INSERT INTO snapshots(id, name, parent, kind, layer, created, updated, labels, origin, size, "
                    "inodes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (record.id, info.name, parent, info.kind.value, record.layer.name, now, now, _dump(info.labels),
                     _dump(record.origin), record.usage.size_bytes, record.usage.inodes))
            except sqlite3.IntegrityError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
                    raise
                raise SnapshotExistsError(f"snapshot {info.name}: exists already") from None
        return replace(record, info=info)

    def commit(self, key: str, name: str, change: Callable[[Record], Record]) -> Record:
        """
        Make the active snapshot `key` the committed `name`; `change` gives its labels, parent, layer and usage.

        Raises:
            SnapshotMissingError: no such key, or no such parent.
            SnapshotExistsError: the name is taken.
            SnapshotStateError: not active; or another parent than the one it has.
            SnapshotInvalidError: the parent is not committed; the name is empty or too long.

        """
        _check_name(name)
        with self._transaction(sync=True) as run:
            old = _get(run, key)
            if run("SELECT 1 FROM snapshots WHERE name = ?", (name,)).fetchone():
                raise SnapshotExistsError(f"committed snapshot {name}: exists already")
            if old.info.kind is not Kind.ACTIVE:
                raise SnapshotStateError(f"snapshot {key} is not active but {old.info.kind.value}")
            new = change(old)
            now = max(time.time_ns(), old.info.created + 1)
            labels = _kept(new.info.labels)
            run("UPDATE snapshots SET name = ?, parent = ?, kind = ?, layer = ?, created = ?, updated = ?, labels = ?, "
                "origin = ?, size = ?, inodes = ? WHERE id = ?",
                (name, parent_of(run, new.info.parent), Kind.COMMITTED.value, new.layer.name, now, now, _dump(labels),
                 _dump(new.origin), new.usage.size_bytes, new.usage.inodes, old.id))
        return replace(new, info=replace(new.info, name=name, kind=Kind.COMMITTED, labels=labels))

    def remove(self, name: str) -> Record:
        """
        Take the snapshot out; a committed bootstrap leaves its goodbye.

        Raises:
            SnapshotMissingError: no such snapshot.
            SnapshotStateError: others stand on it.

        """
        with self._transaction() as run:
            record = _get(run, name)
            if run("SELECT 1 FROM snapshots WHERE parent = ? LIMIT 1", (record.id,)).fetchone():
                raise SnapshotStateError(f"snapshot {name} cannot be removed: it has children")
            run("DELETE FROM snapshots WHERE id = ?", (record.id,))
            if record.layer is LayerKind.LAZY_BOOTSTRAP and record.info.kind is Kind.COMMITTED:
                labels = {**record.origin, **record.info.labels}
                run("INSERT INTO goodbyes(id, name, labels) VALUES (?, ?, ?)", (record.id, name, _dump(labels)))
        return record

    def set_labels(self, name: str, change: Callable[[Mapping[str, str]], Mapping[str, str]]) -> Record:
        """Replace the labels by what `change` makes of them. Raises SnapshotMissingError, and what `change` raises."""
        with self._transaction() as run:
            old = _get(run, name)
            labels = _kept(change(old.info.labels))
            updated = max(time.time_ns(), old.info.updated + 1)
            run("UPDATE snapshots SET labels = ?, updated = ? WHERE id = ?", (_dump(labels), updated, old.id))
        return replace(old, info=replace(old.info, labels=labels, updated=updated))

    def goodbyes(self) -> list[Goodbye]:
        rows = self._read("SELECT id, name, labels FROM goodbyes ORDER BY id")
        return [Goodbye(row[0], row[1], json.loads(row[2])) for row in rows]

    def said_goodbye(self, record_id: int) -> None:
        with self._transaction() as run:
            run("DELETE FROM goodbyes WHERE id = ?", (record_id,))

    def _read(self, statement: str, *words: str) -> list[Any]:
        """The rows of one statement, which is a transaction of its own."""
        with self._lock, _translated("the snapshotter's records"):
            return self._connection.execute(statement, words).fetchall()

    @contextlib.contextmanager
    def _transaction(self, *, sync: bool = False) -> Iterator[Callable[..., sqlite3.Cursor]]:
        """All or nothing; an error in the block undoes it. `sync`: on disk when it ends."""
        with self._lock, _translated("the snapshotter's records"):
            self._connection.execute(f"PRAGMA synchronous={'FULL' if sync else 'NORMAL'}")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection.execute
                self._connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise


def parent_of(run: Callable[..., sqlite3.Cursor], parent: str) -> int | None:
    """The id of a parent that may have children; None for none. Raises SnapshotMissingError, SnapshotInvalidError."""
    if not parent:
        return None
    row = run("SELECT id, kind FROM snapshots WHERE name = ?", (parent,)).fetchone()
    if row is None:
        raise SnapshotMissingError(f"parent snapshot {parent} does not exist")
    if row[1] != Kind.COMMITTED.value:
        raise SnapshotInvalidError(f"parent snapshot {parent} is not committed but {row[1]}")
    return int(row[0])


def _check_version(path: Path, version: int) -> None:
    if version > VERSION:
        raise HostError(f"{path} was written by a later lazyfs: version {version}, this one knows {VERSION}",
                        hint="install that version again")


def _get(run: Callable[..., sqlite3.Cursor], name: str) -> Record:
    row = run(f"SELECT {_COLUMNS}{_FROM}WHERE s.name = ?", (name,)).fetchone()
    if row is None:
        raise _missing(name)
    return _record(row)


def _missing(name: str) -> SnapshotMissingError:
    return SnapshotMissingError(f"snapshot {name} does not exist")


def _check_name(name: str) -> None:
    if not name:
        raise SnapshotInvalidError("a snapshot needs a name")
    if len(name.encode()) > NAME_BYTES_MAX:
        raise SnapshotInvalidError(f"a name of {len(name.encode())} bytes, at most {NAME_BYTES_MAX} are taken")


def _record(row: tuple[int, str, str, str, str, int, int, str, str, int, int]) -> Record:
    info = SnapshotInfo(name=row[1], parent=row[2], kind=Kind(row[3]), labels=json.loads(row[7]), created=row[5],
                        updated=row[6])
    return Record(row[0], info, LayerKind[row[4]], json.loads(row[8]), Usage(row[9], row[10]))


def _kept(labels: Mapping[str, str]) -> dict[str, str]:
    """A label without a value is no label: containerd keeps none such either."""
    return {key: value for key, value in labels.items() if value}


def _dump(labels: Mapping[str, str]) -> str:
    return json.dumps(dict(labels), ensure_ascii=False, separators=(",", ":"))


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise DiskFullError(f"{what}: disk full", hint="make room there") from error
        raise HostError(f"{what}: {error}", hint="'lazyfs doctor' looks at the disk and the state directory") from error
    except sqlite3.DatabaseError as error:
        hint = "if the file is damaged, remove all images from containerd, then this directory"
        raise HostError(f"{what}: {error}", hint=hint) from error
