"""
The worker: one cache directory, one FUSE session, one fetch engine, many mounts.

What another worker needs to go on from here is in the run directory before the kernel can ask for it: a record is
written before its mount is made, and the numbers before they are used (node.restore reads them).

Layer: node. Who calls: node.control with requests, node.serving runs it. Invariants: a mount that fails or is
cancelled leaves nothing behind; a target has one mount; everything that may hang in the kernel is done by the mounter
(fs.mounter). Runs on the trio loop; what blocks goes to threads.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

import trio

from lazyfs import __version__
from lazyfs.errors import BusyError, LazyfsError, TargetError
from lazyfs.fs import drivers, mountapi
from lazyfs.node import restore, verifying
from lazyfs.node.copying import Copying
from lazyfs.node.handed import HandedCredentials
from lazyfs.node.housekeeping import Housekeeper
from lazyfs.node.mounted import MountedImage
from lazyfs.node.mounting import Mounting
from lazyfs.node.observing import Observer
from lazyfs.node.opening import open_tables
from lazyfs.node.prefetching import Prefetching
from lazyfs.node.rundir import ProcessIdentity, WorkerDir
from lazyfs.node.scrubbing import Scrubbing
from lazyfs.node.touches import Touches
from lazyfs.node.unmount import check_target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.fs.mountapi import MountEntry
    from lazyfs.fs.mounter import MounterClient
    from lazyfs.fs.served import Served
    from lazyfs.node.order import MountOrder
    from lazyfs.node.peering import NodePeers
    from lazyfs.node.rundir import MountRecord

_TEND_S = 2.0                    # how soon a foreign umount(8), or a complete image, is noticed
_CHECKPOINT_S = 30.0             # a crash of the machine may cost what was fetched since
_DETACH_POLL_S = 0.1
_log = logging.getLogger("lazyfs.node")


class Worker:
    """See the module. `finished` is set when the worker should end."""

    def __init__(
        self, directory: WorkerDir, cache: CacheDir, fetcher: Fetcher, served: Served, mounter: MounterClient,
        *, lasting: bool = False, lists: bool = True,
    ) -> None:
        """`lasting`: the daemon's, goes on without mounts, else it ends with the last; `lists`: see Prefetching."""
        self._directory = directory
        self._cache = cache
        self._fetcher = fetcher
        self._served = served
        identity = ProcessIdentity.of(os.getpid())
        assert identity is not None
        self._identity = identity
        self._mounts: dict[str, MountedImage] = {}
        self._detached: list[MountedImage] = []
        self._busy_targets: set[str] = set()
        self._lasting = lasting
        self.awaits_order = not lasting   # its starter fetches the bootstrap first; a slow registry takes a while
        self._broken: dict[int, restore.Broken] = {}
        self.housekeeper = Housekeeper(cache, self)
        self.scrubbing = Scrubbing(cache, fetcher, self.all_mounts)
        self._mounting = Mounting(
            directory, cache, fetcher, served, mounter,
            identity=identity, housekeeper=self.housekeeper, on_lost=self._mounter_lost)
        self.credentials = HandedCredentials(directory.handed)
        self.prefetching = Prefetching(fetcher, cache.path, lists=lists)
        self.touches = Touches(self._mounts.get)
        self.observer = Observer(directory, cache, fetcher, served, self)
        self.copying = Copying(fetcher, cache, self.housekeeper, directory, mounts=self._mounts.values,
                               note=self._note_again, ended=self.finish_if_idle)
        self.peers: NodePeers | None = None    # where [peers] is configured
        self.leaving: Callable[[MountedImage], None] = lambda _: None   # told of every mount that ends
        self.closing = False
        self.dissolving = False           # nothing is served, and nobody is to come after us
        self.finished = trio.Event()

    # --- requests ----------------------------------------------------------------------------------------------------

    async def mount(self, order: MountOrder, *, ensure: bool = False) -> dict[str, Any]:
        """
        Mount an image; the target is readable when this returns.

        Args:
            order: what and where.
            ensure: be content if just that is mounted there already.

        Raises:
            LazyfsError: whatever is in the way; nothing is left behind then. The same on cancel.

        """
        driver = drivers.choose_driver(order.driver)
        admitted = await verifying.admit(order, self._cache.path)
        if order.target in self._busy_targets:
            raise BusyError(f"{order.target} is being mounted or unmounted by another command")
        known = self._mounts.get(order.target)
        if ensure and known is not None and known.is_for(order) and self._is_mounted(known):
            self.prefetching.begin(known)
            return known.describe()
        if known is not None and not self._is_mounted(known):
            self._let_go(known, in_use=True)   # somebody else has unmounted it, and tend() has not looked yet
        self._busy_targets.add(order.target)
        try:
            # both abandoned on cancel: they only read, and may wait for a file server, or a registry, that is down
            await trio.to_thread.run_sync(check_target, order.target, abandon_on_cancel=True)
            opened, erofs = await self.housekeeper.with_room(
                open_tables, admitted, self._cache.path, abandon_on_cancel=True)
            mounted = MountedImage(order, self._served.new_slot(), opened, driver)
            try:
                await self._mounting.attach(mounted, erofs, self.prefetching.begin_hot)
            except BaseException:
                with trio.CancelScope(shield=True):
                    await self._undo(mounted)
                raise
            self._mounts[order.target] = mounted
            self.prefetching.begin(mounted)
            return mounted.describe()
        finally:
            self._busy_targets.discard(order.target)
            self.awaits_order = False
            self.finish_if_idle()

    async def unmount(self, target: str, *, lazy: bool, force: bool) -> dict[str, Any]:
        """
        Unmount. `lazy`: detach now, serve who still uses it until they are done. `force`: detach, and serve nobody.

        Raises:
            BusyError: in use, and neither lazy nor force. TargetError: not mounted by this worker.

        """
        if target in self._busy_targets:
            raise BusyError(f"{target} is being mounted or unmounted by another command")
        mounted = self._mounts.get(target)
        if mounted is None:
            return await self._unmount_broken(target, lazy=lazy, force=force)
        self._busy_targets.add(target)
        try:
            with trio.CancelScope(shield=True):   # bounded by the mounter's timeout; half an unmount helps nobody
                if self._is_mounted(mounted):
                    await self._unmount_in_kernel(mounted, lazy=lazy, force=force)
                self._let_go(mounted, in_use=lazy and not force)
        finally:
            self._busy_targets.discard(target)
            self.finish_if_idle()
        return {"target": target, "detached": mounted.detached, "ending": self.closing}

    async def _unmount_broken(self, target: str, *, lazy: bool, force: bool) -> dict[str, Any]:
        """As unmount(), of what cannot be served: whoever waits has had an error already."""
        broken = next((one for one in self._broken.values() if one.record.target == target), None)
        if broken is None:
            raise TargetError(f"{target} is not mounted by this worker")
        record = broken.record
        self._busy_targets.add(target)
        try:
            with trio.CancelScope(shield=True):
                if restore.state_of(record, self._directory) is restore.State.MOUNTED:
                    await self._mounting.call("unmount", target, mountapi.MNT_DETACH if lazy or force else 0)
            kept = lazy and not force and restore.state_of(record, self._directory) is restore.State.DETACHED
            if not kept:   # else somebody may be inside, and is served again as soon as it can be
                self._broken.pop(record.slot, None)
                self._directory.remove_record(record.slot)
        finally:
            self._busy_targets.discard(target)
            self.finish_if_idle()
        return {"target": target, "detached": kept, "ending": self.closing}

    def rest(self, target: str) -> dict[str, Any]:
        """No container uses it any more: stop fetching ahead. Raises TargetError: not mounted by this worker."""
        mounted = self._mounts.get(target)
        if mounted is None:
            raise TargetError(f"{target} is not mounted by this worker")
        return {"stopped": self.prefetching.rest(mounted)}

    def list_mounts(self) -> list[dict[str, Any]]:
        return [mounted.describe() for mounted in self.all_mounts()]

    def health(self) -> dict[str, Any]:
        """Whether it serves, and what it cannot serve."""
        return {
            "ready": not self.closing, "version": __version__, "pid": self._identity.pid,
            "cache_dir": str(self._cache.path), "mounts": len(self._mounts), "detached": len(self._detached),
            "broken": [broken.describe() for broken in self._broken.values()],
            "sources": [one for one in self._fetcher.describe_sources() if one["state"] != "ok"],
        }

    def mounts(self) -> Iterable[MountedImage]:
        """Those that are attached."""
        return self._mounts.values()

    def all_mounts(self) -> tuple[MountedImage, ...]:
        """And those that are detached."""
        return (*self._mounts.values(), *self._detached)

    @property
    def mounting(self) -> bool:
        """Whether a mount is being made or unmade."""
        return bool(self._busy_targets)

    def images_in_use(self) -> dict[str, list[str]]:
        """Hex of the bootstrap's digest: where it is mounted, or was; also what cannot be served now."""
        found: dict[str, list[str]] = {}
        for mounted in (*self._mounts.values(), *self._detached):
            found.setdefault(mounted.opened.layer.digest.hex, []).append(mounted.order.target)
        for broken in self._broken.values():
            found.setdefault(broken.record.bootstrap.rpartition(":")[2], []).append(broken.record.target)
        for name in self.copying.fetching.in_use():
            found.setdefault(name, []).append("(being fetched)")
        return found

    def shut_down(self) -> None:
        """Begin to end: no new requests."""
        self.closing = True
        if self.peers is not None:
            self.peers.ends(leaves=self.dissolving)
        self.finished.set()

    def _mounter_lost(self) -> None:
        """Nothing can be mounted or unmounted any more: the next worker has a mounter of its own."""
        if self._lasting and not self.closing:
            _log.error("the mounter process has died: another worker takes over")
            self.shut_down()

    # --- life --------------------------------------------------------------------------------------------------------

    async def tend(self) -> None:
        """Notice what happens without us, for ever; and what could not be served is tried again."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._retry_broken)   # by itself: it may wait for a registry
            nursery.start_soon(self._tend_mounts)
            nursery.start_soon(self.observer.run)
            nursery.start_soon(self._mounting.warming.run)
            nursery.start_soon(self.prefetching.run)
            nursery.start_soon(self.copying.run)

    async def _tend_mounts(self) -> None:
        """Foreign unmounts, images that are complete, users that have gone."""
        elapsed_s = 0.0
        while True:
            await trio.sleep(_TEND_S)
            elapsed_s += _TEND_S
            entries = mountapi.mounts()
            for mounted in list(self._mounts.values()):
                if mounted.order.target not in self._busy_targets and not self._is_mounted(mounted, entries):
                    _log.info("%s was unmounted by somebody else", mounted.order.target)
                    self._let_go(mounted, in_use=True)
                elif not mounted.order.record and not self.touches.is_fine(mounted.bdi_names):
                    mounted.tend_read_ahead()
            for mounted in [one for one in self._detached if not one.in_use(self._served)]:
                self._detached.remove(mounted)
                self._directory.remove_record(mounted.slot)
                mounted.release(self._served)
            self.finish_if_idle()
            if elapsed_s >= _CHECKPOINT_S:
                elapsed_s = 0.0
                await trio.to_thread.run_sync(self._cache.checkpoint)

    async def unmount_all(self) -> None:
        """Detach and release everything. For the end; never raises an Exception."""
        self.closing = True
        for mounted in (*self._mounts.values(), *self._detached):
            await self._undo(mounted)
        self._mounts.clear()
        self._detached.clear()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to serve."""
        return not (self._mounts or self._detached or self._busy_targets or self._broken or self.awaits_order)

    def finish_if_idle(self, *, even_lasting: bool = False) -> None:
        """An embedded worker ends with its last mount."""
        if self.idle and (even_lasting or not (self._lasting or self.copying.fetching.busy)):
            self.dissolving = True
            self.shut_down()

    def _is_mounted(self, mounted: MountedImage, entries: list[MountEntry] | None = None) -> bool:
        entry = mountapi.mount_at(mounted.order.target, entries)
        return entry is not None and entry.mount_id == mounted.mount_id

    # --- taking over -------------------------------------------------------------------------------------------------

    async def restore(self) -> None:
        """
        Take up what the worker before this one served, before the kernel asks for it.

        What cannot be restored is reported, answers with errors, and is tried again now and then.
        """
        self._served.begin_numbers(*self._directory.read_numbers())
        entries = mountapi.mounts()   # once: nothing is mounted or unmounted by us meanwhile, and readers wait
        for record in self._directory.records():
            self._served.begin_numbers(max([-1, *record.device_indexes]) + 1, record.slot + 1)
            await self._restore(record, entries, offline=True)

    async def resume_prefetch(self) -> None:
        """Go on with what the worker before this one had not yet fetched ahead. When readers are served again."""
        for mounted in list(self._mounts.values()):
            await trio.lowlevel.checkpoint()
            self._mounting.warming.begin(mounted)
            self.prefetching.begin(mounted)

    async def _restore(self, record: MountRecord, entries: list[MountEntry], *, offline: bool) -> None:
        state = restore.state_of(record, self._directory, entries)
        if state is restore.State.GONE:
            self._broken.pop(record.slot, None)
            self._directory.remove_record(record.slot)
            return
        mounted = None
        try:
            mounted = await trio.to_thread.run_sync(
                restore.reopen, record, self._cache, self._fetcher, offline, abandon_on_cancel=True)
            if not offline:   # which may have taken a while
                entries = mountapi.mounts()
                state = restore.state_of(record, self._directory, entries)
            if state is restore.State.GONE or not (offline or record.slot in self._broken):
                mounted.release(self._served)
                return        # the next round takes its record away
            restore.serve(mounted, record, self._served)
            self._fetcher.peering.use(mounted.fetch_devices(), mounted.order)
        except Exception as error:  # noqa: BLE001 - one broken image must not keep the others from being served
            if offline or str(error) != self._broken[record.slot].reason:
                _log.error("%s (%s) cannot be served: %s", record.target, record.image, error)
            if offline or record.slot in self._broken:   # else it was unmounted meanwhile
                self._broken[record.slot] = restore.Broken(record, str(error))
            if mounted is not None:
                mounted.release(self._served)
            return
        self._broken.pop(record.slot, None)
        if state is restore.State.MOUNTED:
            entry = mountapi.mount_at(record.target, entries)
            mounted.mount_id = entry.mount_id if entry is not None else 0
            self._mounts[record.target] = mounted
        else:
            mounted.detached = True
            self._detached.append(mounted)
        self._note_again(mounted)

    def _note_again(self, mounted: MountedImage) -> None:
        """A run directory that is full ends nothing that is served: the record that is there says nearly the same."""
        try:
            self._directory.write_record(mounted.record(self._identity, self._cache.path))
        except OSError as error:
            _log.error("the record of %s stays as it is: %s", mounted.order.target, error)

    async def _retry_broken(self) -> None:
        while True:
            await trio.sleep(_TEND_S)
            for broken in list(self._broken.values()):
                if broken.record.slot in self._broken and broken.record.target not in self._busy_targets:
                    await self._restore(broken.record, mountapi.mounts(), offline=False)

    # --- taking it away ----------------------------------------------------------------------------------------------

    async def _unmount_in_kernel(self, mounted: MountedImage, *, lazy: bool, force: bool) -> None:
        """
        Call umount2(2). Once detached, it waits for reads under way (truncate_inode_pages): these are then ended, for
        nobody is left to read. Not so when lazy: the mount's users go on.
        """
        if force:
            mounted.abort_reads()
        error: LazyfsError | None = None
        async with trio.open_nursery() as nursery:
            if not lazy:
                nursery.start_soon(self._abort_once_detached, mounted)
            flags = mountapi.MNT_DETACH if lazy or force else 0
            try:
                await self._mounting.unmount(mounted, flags)
            except LazyfsError as raised:   # kept: out of a nursery it would come as a group
                error = raised
            nursery.cancel_scope.cancel()
        if error is not None and self._is_mounted(mounted):
            raise error

    async def _abort_once_detached(self, mounted: MountedImage) -> None:
        while True:
            await trio.sleep(_DETACH_POLL_S)
            if not self._is_mounted(mounted):
                mounted.abort_reads()

    async def _undo(self, mounted: MountedImage) -> None:
        """Take a mount away however far it got."""
        target = mounted.order.target
        mounted.abort_reads()
        entry = mountapi.mount_at(target) if mounted.attempted and not mounted.detached else None
        if entry is not None and mounted.mount_id in {0, entry.mount_id}:
            try:
                await self._mounting.unmount(mounted, mountapi.MNT_DETACH)
            except LazyfsError as error:
                _log.error("%s stays mounted: %s", target, error)
        self._directory.remove_record(mounted.slot)
        mounted.release(self._served)

    def _let_go(self, mounted: MountedImage, *, in_use: bool) -> None:
        """After it was unmounted: release it, or keep it for those who still use it."""
        del self._mounts[mounted.order.target]
        self.leaving(mounted)
        if in_use and mounted.in_use(self._served):
            mounted.detached = True
            self._detached.append(mounted)
            self._note_again(mounted)
        else:
            self._directory.remove_record(mounted.slot)
            mounted.release(self._served)
