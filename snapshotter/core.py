"""
The ten operations on snapshots, as containerd's contract and its overlayfs snapshotter have them; no gRPC in it.

Layer: snapshotter; above records, directories, overlay, filters, the seam to lazy images. Who calls: service, tests.

Ordinary layers: a directory each. Lazy images (docs/snapshotter.md): a blob layer is committed empty, at once, without
being downloaded; the bootstrap layer is an ordinary one; whatever stands on it has the mounted image below, in the
place of the bootstrap and of everything under it.

Order of every change, so that a kill at any point leaves nothing to repair: directories first, then the record; the
record away first, then directories. Transactions never span a walk, a mount, or a call of the hook.
Keys are taken as they come: namespaces are containerd's affair, and part of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from lazyfs.errors import HostError, LazyfsError
from snapshotter import idmap, overlay
from snapshotter.ahead import Ahead
from snapshotter.directories import Directories, owner_of
from snapshotter.diskuse import disk_usage
from snapshotter.failures import (
    SnapshotExistsError,
    SnapshotInvalidError,
    SnapshotMissingError,
    SnapshotStateError,
    SnapshotUnavailableError,
)
from snapshotter.filters import parse_filters
from snapshotter.labels import changed_labels, check_labels
from snapshotter.lazyhook import LayerKind, LazyLayer
from snapshotter.model import (
    LABEL_GID_MAPPING,
    LABEL_REF,
    LABEL_UID_MAPPING,
    Kind,
    Mount,
    SnapshotInfo,
    Usage,
)
from snapshotter.records import Goodbye, Record, Records

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from snapshotter.lazyhook import LazyHook

_LOG = logging.getLogger("lazyfs.snapshotter")
_HASH_CHARS = 16


class Snapshots:
    """All snapshots below one root. Methods may be called from any thread; HostError, DiskFullError come from all."""

    def __init__(self, directories: Directories, records: Records, hook: LazyHook) -> None:
        self._directories = directories
        self._records = records
        self._hook = hook
        self._ahead = Ahead()
        self._node = overlay.probe(directories.root)

    @classmethod
    def open(cls, root: Path, hook: LazyHook) -> Snapshots:
        """
        Open the snapshots below `root`, or begin there.

        Raises:
            UsageError, BusyError, HostError: as Directories.open() and Records.open().

        """
        directories = Directories.open(root)
        try:
            records = Records.open(directories.root / "metadata.db")
            try:
                directories.start_above(records.last_id())
                return cls(directories, records, hook)
            except BaseException:
                records.close()
                raise
        except BaseException:
            directories.close()
            raise

    def close(self) -> None:
        self._ahead.close()
        self._records.close()
        self._directories.close()

    def prepare(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """
        Begin an active snapshot.

        Raises:
            SnapshotExistsError: the key is taken; or the layer is lazy and is there now, without a download.
            SnapshotMissingError: no such parent.
            SnapshotInvalidError: the parent is not committed; labels that cannot be.
            SnapshotUnavailableError: the lazy image below cannot be mounted.

        """
        check_labels(labels)
        chain = self._chain_of_parent(parent)
        layer = self._hook.classify(labels)
        if layer is LayerKind.LAZY_BLOB and labels.get(LABEL_REF):
            self._commit_blob(labels[LABEL_REF], chain, labels)
        return self._begin(Kind.ACTIVE, key, chain, labels,
                           LayerKind.LAZY_BOOTSTRAP if layer is LayerKind.LAZY_BOOTSTRAP else LayerKind.ORDINARY)

    def view(self, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount]:
        """Begin a read-only snapshot. Raises as prepare()."""
        check_labels(labels)
        return self._begin(Kind.VIEW, key, self._chain_of_parent(parent), labels, LayerKind.ORDINARY)

    def mounts(self, key: str) -> list[Mount]:
        """
        Say again how to mount an active snapshot or a view; mounts the lazy image below if it is not.

        Raises:
            SnapshotMissingError, SnapshotStateError: committed. SnapshotUnavailableError: as prepare().

        """
        record, *below = self._records.chain(key)
        if record.info.kind is Kind.COMMITTED:
            raise SnapshotStateError(f"snapshot {key} is committed: it has no mounts")
        mapping = _mapping(below, record.info.labels)
        lowers = self._lowers(below, record.info.labels)
        self._directories.restore(record.id, work=record.info.kind is Kind.ACTIVE,
                                  owner=self._owner(record.info.labels, lowers, below))
        return self._mounts(record, self._map(record.id, lowers, mapping), mapping)

    def commit(self, name: str, key: str, labels: Mapping[str, str], parent: str = "") -> None:
        """
        Make the active snapshot `key` the committed one `name`, with these labels instead of its own.

        A lazy image is mounted then, by a thread: a container will probably follow.

        Args:
            name: of the committed one.
            key: of the active one; nobody has this name afterwards.
            labels: all that it will have.
            parent: for one that was prepared without; "" leaves it as it is.

        Raises:
            SnapshotMissingError, SnapshotExistsError, SnapshotStateError, SnapshotInvalidError.

        """
        check_labels(labels)
        active = self._records.get(key)
        if active.info.kind is not Kind.ACTIVE:
            raise SnapshotStateError(f"snapshot {key} is not active but {active.info.kind.value}")
        usage = self._walk(active)
        is_bootstrap = self._hook.classify(labels) is LayerKind.LAZY_BOOTSTRAP

        def change(old: Record) -> Record:
            if parent and old.info.parent and parent != old.info.parent:
                raise SnapshotInvalidError(f"snapshot {key} stands on {old.info.parent}, it cannot be put on {parent}")
            layer = LayerKind.LAZY_BOOTSTRAP if is_bootstrap else old.layer
            origin = {} if layer is LayerKind.ORDINARY else {**old.origin, **labels}
            info = replace(old.info, labels=labels, parent=old.info.parent or parent)
            return replace(old, info=info, layer=layer, origin=origin, usage=usage)

        committed = self._records.commit(key, name, change)
        if committed.layer is LayerKind.LAZY_BOOTSTRAP:
            self._ahead.soon(f"mounting {name}", lambda: self._mount_ahead(committed))

    def remove(self, name: str) -> None:
        """
        Forget a snapshot, and free what it holds; its files go a moment later.

        Raises:
            SnapshotMissingError. SnapshotStateError: others stand on it.

        """
        record = self._records.remove(name)
        if record.layer is LayerKind.LAZY_BOOTSTRAP and record.info.kind is Kind.COMMITTED:
            self._directories.discard(record.id)   # the hook sees by it that it is too late to mount
            self._say_goodbyes(only=record.id)
        else:
            self._directories.discard_soon(record.id)
        if record.info.kind is not Kind.COMMITTED and record.info.parent:
            self._ahead.soon(f"what is fetched ahead below {name}", lambda: self._rest(record.info.parent))

    def stat(self, name: str) -> SnapshotInfo:
        """Raises SnapshotMissingError."""
        return self._records.get(name).info

    def update(self, name: str, labels: Mapping[str, str], paths: Sequence[str] = ()) -> SnapshotInfo:
        """
        Change labels: those that `paths` name ("labels.KEY"), or all ("labels", or no paths).

        Raises:
            SnapshotMissingError. SnapshotInvalidError: another field; labels that cannot be.

        """
        return self._records.set_labels(name, lambda old: changed_labels(name, old, labels, paths)).info

    def find(self, filters: Iterable[str] = ()) -> list[SnapshotInfo]:
        """All that any of the filters takes, by name. Raises SnapshotInvalidError: a filter does not parse."""
        match = parse_filters(filters)
        return [record.info for record in self._records.all() if match(record.info)]

    def usage(self, name: str) -> Usage:
        """
        What a snapshot takes of the disk, without its parents; a lazy image's cached data counts for its bootstrap.

        Raises:
            SnapshotMissingError.

        """
        record = self._records.get(name)
        if record.info.kind is Kind.ACTIVE:
            return self._walk(record)
        if record.info.kind is Kind.VIEW or record.layer is not LayerKind.LAZY_BOOTSTRAP:
            return record.usage
        try:
            cached = self._hook.usage(self._lazy(record))
        except LazyfsError as error:
            _LOG.warning("usage of %s without its cached data: %s", name, error)
            return record.usage
        return Usage(record.usage.size_bytes + cached.size_bytes, record.usage.inodes + cached.inodes)

    def bootstraps(self) -> dict[int, str]:
        """Names of all committed snapshots of bootstraps, by id: the lazy images that there are."""
        return {record.id: record.info.name for record in self._records.all()
                if record.layer is LayerKind.LAZY_BOOTSTRAP and record.info.kind is Kind.COMMITTED}

    def check(self) -> None:
        """Read the records, and nothing else: whether somebody could be answered."""
        self._records.last_id()

    def cleanup(self) -> None:
        """Remove what a kill has left, and let go of lazy images that could not be let go before."""
        reclaimed = self._directories.reclaim(self._records.ids)
        if reclaimed:
            _LOG.info("removed %d directories that belonged to no snapshot", reclaimed)
        self._say_goodbyes()

    def _chain_of_parent(self, parent: str) -> list[Record]:
        """The parent and all below, top first. Raises SnapshotMissingError, SnapshotInvalidError."""
        if not parent:
            return []
        try:
            chain = self._records.chain(parent)
        except SnapshotMissingError:
            raise SnapshotMissingError(f"parent snapshot {parent} does not exist") from None
        if chain[0].info.kind is not Kind.COMMITTED:
            raise SnapshotInvalidError(f"parent snapshot {parent} is not committed but {chain[0].info.kind.value}")
        return chain

    def _begin(self, kind: Kind, key: str, chain: list[Record], labels: Mapping[str, str],
               layer: LayerKind) -> list[Mount]:
        lowers = self._lowers(chain, labels)
        mapping = _mapping(chain, labels)
        info = SnapshotInfo(key, chain[0].info.name if chain else "", kind, labels)
        origin = {} if layer is LayerKind.ORDINARY else labels
        owner = self._owner(labels, lowers, chain)
        with self._directories.making(work=kind is Kind.ACTIVE, owner=owner) as snapshot_id:
            lowers = self._map(snapshot_id, lowers, mapping)
            record = self._records.insert(Record(snapshot_id, info, layer, origin))
        return self._mounts(record, lowers, mapping)

    def _commit_blob(self, ref: str, chain: list[Record], labels: Mapping[str, str]) -> None:
        """
        Have a committed, empty snapshot for a lazy blob layer. Always raises SnapshotExistsError: that is containerd's
        word for "do not download it". One snapshot serves all namespaces, as its name is made of the layer chain alone.
        """
        parent = chain[0] if chain else None
        name = ref
        if parent and not (parent.layer is LayerKind.LAZY_BLOB and parent.info.name == parent.origin.get(LABEL_REF)):
            name = f"{ref}@{hashlib.sha256(parent.info.name.encode()).hexdigest()[:_HASH_CHARS]}"
        below = parent.info.name if parent else ""
        try:
            there = self._records.get(name)
        except SnapshotMissingError:
            with self._directories.making(work=False, owner=None) as snapshot_id:
                usage = disk_usage(self._directories.fs(snapshot_id))
                info = SnapshotInfo(name, below, Kind.COMMITTED, labels)
                there = self._records.insert(Record(snapshot_id, info, LayerKind.LAZY_BLOB, labels, usage))
        if (there.layer, there.info.parent) != (LayerKind.LAZY_BLOB, below):
            raise SnapshotStateError(f"snapshot {name} is there, but is not the lazy layer on {below or 'nothing'}")
        raise SnapshotExistsError(f"lazy layer {ref} is there as snapshot {name}: nothing to download")

    def _lowers(self, chain: list[Record], labels: Mapping[str, str]) -> list[Path]:
        """
        What is below an overlay on this chain, top first; lazy blobs are empty: left out. `labels`: of what is above.

        Raises:
            SnapshotUnavailableError: the image cannot be mounted now.
            SnapshotStateError: a container on lazy blobs whose bootstrap is missing: it would see an empty root.

        """
        lowers: list[Path] = []
        for record in chain:
            if record.layer is LayerKind.LAZY_BOOTSTRAP:
                return [*lowers, self._tree(record)]
            if record.layer is LayerKind.ORDINARY:
                lowers.append(self._directories.fs(record.id))
            elif not labels.get(LABEL_REF):   # with it, containerd is unpacking: the bootstrap is still to come
                raise SnapshotStateError(f"lazy layer {record.info.name} has no bootstrap layer above it",
                                         hint="the image is not a whole lazy image: convert it again")
        return lowers

    def _tree(self, bootstrap: Record) -> Path:
        """Where its image is mounted. Raises SnapshotUnavailableError; SnapshotMissingError: removed meanwhile."""
        try:
            tree = self._hook.ensure_mounted(self._lazy(bootstrap))
        except LazyfsError as error:
            text = f"lazy image below {bootstrap.info.name}: {error}"
            raise SnapshotUnavailableError(text, hint=error.hint) from error
        self._check_there(bootstrap)
        return tree

    def _mount_ahead(self, bootstrap: Record) -> None:
        """Raises LazyfsError."""
        self._hook.mount_ahead(self._lazy(bootstrap))
        self._check_there(bootstrap)

    def _rest(self, parent: str) -> None:
        """A container on it is gone: if it was the last one on its image, nothing more is fetched ahead."""
        with contextlib.suppress(SnapshotMissingError):   # the image went with it
            chain = self._records.chain(parent)
            bootstrap = next((one for one in chain if one.layer is LayerKind.LAZY_BOOTSTRAP), None)
            if bootstrap is not None:
                self._hook.rest(self._lazy(bootstrap), self._records.in_use)

    def _check_there(self, bootstrap: Record) -> None:
        """After its image was mounted. Raises SnapshotMissingError: removed meanwhile; then it is let go again."""
        if bootstrap.id not in self._records.ids():   # then its goodbye may have been said before we mounted
            self._let_go(Goodbye(bootstrap.id, bootstrap.info.name, self._lazy(bootstrap).labels))
            raise SnapshotMissingError(f"snapshot {bootstrap.info.name} was removed meanwhile")

    def _owner(self, labels: Mapping[str, str], lowers: list[Path], below: list[Record]) -> tuple[int, int] | None:
        """
        Whose the root directory of a snapshot is; None: ours.

        Raises:
            HostError, SnapshotInvalidError. SnapshotMissingError: what it stands on was removed meanwhile.

        """
        try:
            return overlay.mapped_root(labels) or (owner_of(lowers[0]) if lowers else None)
        except HostError:
            there = self._records.ids()
            for record in below:
                if record.id not in there:
                    raise SnapshotMissingError(f"snapshot {record.info.name} was removed meanwhile") from None
            raise

    def _map(self, snapshot_id: int, lowers: list[Path], mapping: tuple[str, str] | None) -> list[Path]:
        """Raises SnapshotUnavailableError: ids cannot be mapped here."""
        if mapping is None:
            return lowers
        try:
            return idmap.mapped(lowers, self._directories.mapped(snapshot_id), *mapping)
        except LazyfsError as error:
            raise SnapshotUnavailableError(str(error), hint=error.hint) from error

    def _mounts(self, record: Record, lowers: list[Path], mapping: tuple[str, str] | None) -> list[Mount]:
        own = self._directories.own(record.id)
        labels = record.info.labels if mapping is None else {}   # what is mapped is not to be mapped again
        return overlay.mounts(record.info.kind, own, lowers, self._node, labels)

    def _lazy(self, record: Record) -> LazyLayer:
        labels = {**record.origin, **record.info.labels}
        return LazyLayer(record.info.name, labels, self._directories.fs(record.id), record.id)

    def _walk(self, record: Record) -> Usage:
        try:
            return disk_usage(self._directories.fs(record.id))
        except FileNotFoundError:
            raise SnapshotMissingError(f"snapshot {record.info.name} was removed meanwhile") from None
        except OSError as error:
            raise HostError(f"cannot look at {error.filename}: {error.strerror}") from error

    def _say_goodbyes(self, only: int | None = None) -> None:
        for goodbye in self._records.goodbyes():
            if only not in {None, goodbye.id}:
                continue
            self._let_go(goodbye)

    def _let_go(self, goodbye: Goodbye) -> None:
        try:
            self._hook.forget(LazyLayer(goodbye.name, goodbye.labels, self._directories.fs(goodbye.id), goodbye.id))
        except LazyfsError as error:
            _LOG.warning("the image of %s is not let go yet: %s", goodbye.name, error)
        else:
            self._records.said_goodbye(goodbye.id)


def _mapping(chain: list[Record], labels: Mapping[str, str]) -> tuple[str, str] | None:
    """The maps of uids and gids that we apply ourselves; None: there are none, or containerd applies them."""
    if overlay.mapped_root(labels) is None or not any(record.layer is LayerKind.LAZY_BOOTSTRAP for record in chain):
        return None
    return labels.get(LABEL_UID_MAPPING, ""), labels.get(LABEL_GID_MAPPING, "")
