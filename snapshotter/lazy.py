"""
Lazy images for core: the LazyHook over the node's daemon.

One mount an image (by the digest of its bootstrap), shared by all snapshots of that bootstrap in all namespaces, and
by all containers on top of them. It is ordered when the image has been pulled or a container is prepared, and taken
away when the last bootstrap snapshot is removed; containerd removes none that has children, so no container is on it.

Layer: snapshotter. Who calls: core, through the Protocol; cli makes it by make_lazy_images(). State: lazyrecords, and
what is under way (lazyflight). Invariants: a snapshot's record is written before it joins an attempt to mount, and a
removal looks at the records only when it is alone; so a mount that somebody was promised is never taken away.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lazyfs import limits
from lazyfs.errors import BusyError, LazyfsError, NotFoundError, TargetError
from lazyfs.node.order import MountOrder
from snapshotter import lazymounts
from snapshotter.lazydaemon import MOUNT_TIMEOUT_S, DaemonLink
from snapshotter.lazydigest import bootstrap_digest
from snapshotter.lazyflight import Flights
from snapshotter.lazyhook import LABEL_BLOB, LABEL_BOOTSTRAP, LayerKind
from snapshotter.lazyrecords import LazyRecord, LazyRecords
from snapshotter.model import Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from lazyfs.node.rundir import ProcessIdentity
    from snapshotter.lazyhook import LazyLayer

LABEL_IMAGE_REF = "containerd.io/snapshot/cri.image-ref"
LABEL_MANIFEST = "containerd.io/snapshot/cri.manifest-digest"
LABEL_FULL_COPY = "containerd.io/snapshot/lazyfs.full-copy"   # off, on, idle: an annotation of the bootstrap layer
_log = logging.getLogger("lazyfs.snapshotter")


@dataclass(frozen=True, slots=True)
class MountSettings:
    """What all mount orders have in common: see node.order.MountOrder. `ahead`: before a container wants it."""

    driver: str = "auto"
    prefetch: bool = True
    read_timeout_s: float = limits.READ_DEADLINE_S
    ahead: bool = True


@dataclass(frozen=True, slots=True)
class _Standing:
    """A mount that is served as long as it is there and its keeper lives, whatever becomes of workers."""

    mount_id: int
    keeper: ProcessIdentity


class ImageFinder(Protocol):
    """Whoever knows which images there are on the node (containerd)."""

    def images(self, digest: str) -> list[str]:
        """
        References of the images with that bootstrap (digest of the uncompressed layer), the newest first.

        Raises:
            LazyfsError: it cannot be asked.

        """

    def guesses(self, digest: str) -> list[str]:
        """Whence that layer may have come, for what is no image yet. Raises LazyfsError: it cannot be asked."""


class LazyImages:
    """See the module, and lazyhook.LazyHook."""

    def __init__(self, root: Path, daemon: DaemonLink, finder: ImageFinder, settings: MountSettings) -> None:
        """
        `root`: the snapshotter's, absolute and resolved.

        Raises:
            HostError: its directories cannot be made.

        """
        self._records = LazyRecords(root)
        self._daemon = daemon
        self._finder = finder
        self._settings = settings
        self._flights = Flights()
        self._confirmed: dict[str, _Standing] = {}   # by digest: what the daemon has said to be mounted

    def classify(self, labels: Mapping[str, str]) -> LayerKind:
        if LABEL_BLOB in labels:
            return LayerKind.LAZY_BLOB
        return LayerKind.LAZY_BOOTSTRAP if LABEL_BOOTSTRAP in labels else LayerKind.ORDINARY

    def ensure_mounted(self, bootstrap: LazyLayer) -> Path:
        return self._have_mounted(bootstrap, guess="")

    def mount_ahead(self, bootstrap: LazyLayer) -> None:
        """Only where a label names the image: containerd does not have it yet. The first container asks again."""
        image = bootstrap.labels.get(LABEL_IMAGE_REF, "")
        if image and self._settings.ahead:
            self._have_mounted(bootstrap, guess=image)

    def _have_mounted(self, bootstrap: LazyLayer, *, guess: str) -> Path:
        """`guess`: the image's reference, if nobody shall be asked for it."""
        record = self._records.of(bootstrap)
        if record is None:
            record = LazyRecord(bootstrap.snapshot_id, bootstrap.name, bootstrap_digest(bootstrap.fs_dir))
            self._records.write(record)
        found = record

        def attempt() -> None:
            self._mount(bootstrap, found, guess)

        target = self._records.target(record.digest)
        confirmed = self._confirmed.get(record.digest)   # after the record was written: see forget()
        if confirmed is None or confirmed != self._standing(target):
            self._flights.shared(record.digest, attempt, 2 * MOUNT_TIMEOUT_S)
        if not bootstrap.fs_dir.is_dir():   # core discards it before it says forget(), which may have come before us
            self.forget(bootstrap)
            raise NotFoundError(f"snapshot {bootstrap.name!r:.100} was removed meanwhile", hint="pull the image again")
        return target

    def rest(self, bootstrap: LazyLayer, in_use: Callable[[Iterable[int]], bool]) -> None:
        """A container that is prepared in this moment, and not on record yet, reads on without what was to come."""
        record = self._records.of(bootstrap)
        if record is None:
            return
        with self._flights.alone(record.digest):
            if in_use([one.snapshot_id for one in self._records.all() if one.digest == record.digest]):
                return
            self._confirmed.pop(record.digest, None)   # so the next container's mount is ordered, which begins it again
            target = self._records.target(record.digest)
            if lazymounts.is_mounted(target):
                self._daemon.rest(str(target))

    def forget(self, bootstrap: LazyLayer) -> None:
        record = self._records.of(bootstrap)
        if record is None:
            return
        with self._flights.alone(record.digest):
            self._confirmed.pop(record.digest, None)   # before the others are counted: a new one asks, and waits for us
            if sum(other.digest == record.digest for other in self._records.all()) <= 1:
                self._unmount(self._records.target(record.digest))
            self._records.remove(record.snapshot_id)   # last: a failure above is tried again

    def usage(self, bootstrap: LazyLayer) -> Usage:
        record = self._records.of(bootstrap)
        return Usage(0, 0) if record is None else self._daemon.usage(record.digest)   # none: never mounted

    def reconcile(self, bootstraps: Mapping[int, str]) -> None:
        """
        Make records, mount points and mounts agree with the snapshots that there are; for the start.

        What belongs to no snapshot is taken away. What should be mounted and is not (after a reboot) is mounted when
        a container asks. Needs neither daemon nor registry; whatever cannot be done is logged, and left for the next
        start.

        Args:
            bootstraps: name by id of all committed bootstrap snapshots.

        """
        kept = [record for record in self._records.all() if bootstraps.get(record.snapshot_id) == record.name]
        self._records.sweep(kept)
        wanted = {self._records.target(record.digest) for record in kept}
        for target in self._records.targets():
            if target in wanted:
                continue
            try:
                lazymounts.detach(target)   # its worker notices
            except LazyfsError as error:
                _log.warning("%s belongs to no snapshot and cannot be taken away: %s", target, error)
            self._records.remove_target(target)

    def _mount(self, bootstrap: LazyLayer, record: LazyRecord, guess: str) -> None:
        """Order the mount. Alone with this digest. `guess`: see _have_mounted()."""
        target = self._records.make_target(record.digest)
        mounted = lazymounts.is_mounted(target)
        image = self._records.reference(record.digest) if mounted else ""
        known = sure = bool(image)
        if not known:
            image, sure = (guess, False) if guess else self._choose_image(bootstrap, record)
            self._records.write_reference(record.digest, image if sure else "")   # before: what is mounted is on record
        order = MountOrder(
            image, str(target), self._settings.driver, prefetch=self._settings.prefetch,
            read_timeout_s=self._settings.read_timeout_s, layer=(record.digest, 0, 0),
            bootstrap_dir=str(bootstrap.fs_dir), by_node=True, full_copy=_full_copy(bootstrap),
            manifest=bootstrap.labels.get(LABEL_MANIFEST, ""))
        keeper = self._daemon.keeper()   # before: if it is another one afterwards, nothing is confirmed
        try:
            self._daemon.mount(order)
        except BusyError:
            raise
        except TargetError:
            if not mounted:
                raise
            if self._daemon.serves(str(target), record.digest):
                if known or not sure:
                    return   # by another reference, which is as good: blobs go by digest
                self._daemon.unmount(str(target))   # it was mounted by a guess
            else:
                _log.warning("%s was mounted by a daemon that is gone; mounting it again", target)
                lazymounts.detach(target)
            self._daemon.mount(order)
        standing = self._standing(target)
        if sure and standing is not None and standing.keeper == keeper:
            self._confirmed[record.digest] = standing

    def _standing(self, target: Path) -> _Standing | None:
        """What is mounted now, and whose it is; without asking the daemon, which may be busy."""
        keeper, mount_id = self._daemon.keeper(), lazymounts.mount_id(target)
        return _Standing(mount_id, keeper) if keeper is not None and mount_id else None

    def _unmount(self, target: Path) -> None:
        try:
            self._daemon.unmount(str(target))
        except LazyfsError as error:
            _log.warning("%s is detached without the daemon: %s", target, error)
        if lazymounts.is_mounted(target):
            lazymounts.detach(target)
        self._records.remove_target(target)

    def _choose_image(self, bootstrap: LazyLayer, record: LazyRecord) -> tuple[str, bool]:
        """
        By which reference the data is fetched, and whether that is sure: the newest image that has this bootstrap.

        Its label names the image that was pulled first; a copy of it that is pulled from elsewhere makes no new
        snapshot. So containerd is asked. For when it cannot say, or its images were removed under their containers:
        what was right the last time, then the label. An image that is still being unpacked, and has no label, is found
        by a guess, which holds until there is an image.
        """
        fallback = self._records.reference(record.digest) or bootstrap.labels.get(LABEL_IMAGE_REF, "")
        try:
            found = self._finder.images(record.digest)
            guesses = [] if found or fallback else self._finder.guesses(record.digest)
        except LazyfsError as error:
            if not fallback:
                raise
            _log.warning("containerd cannot say which images there are, %s is taken: %s", fallback, error)
            found, guesses = [], []
        if found or fallback:
            return (found[0] if found else fallback), True
        if guesses:
            return guesses[0], False
        text = f"no image in containerd has the bootstrap {record.digest[:19]} of snapshot {bootstrap.name!r:.100}"
        raise NotFoundError(text, hint="pull the image again, with lazyfs pull")


def _full_copy(bootstrap: LazyLayer) -> str:
    """What the image says of it; as the node is configured if it says nothing that we know."""
    wanted = bootstrap.labels.get(LABEL_FULL_COPY, "")
    return wanted if wanted in {"off", "on", "idle"} else ""
