"""
Unmounting from outside the worker: targets, stale mounts, refusals that name who is in the way.

Layer: node. Who calls: cli.mount (umount, and the clean-up before a mount), node.worker for its own start. Never
hangs: nothing here touches the mounted file system, and each umount2 runs in a child with a deadline (fs.isolate).
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import BusyError, LazyfsError, TargetError
from lazyfs.fs import mountapi
from lazyfs.fs.isolate import call_isolated
from lazyfs.node.holders import describe_holders
from lazyfs.node.rundir import MountRecord, WorkerDir, all_worker_dirs, read_boot_id

if TYPE_CHECKING:
    from lazyfs.fs.mountapi import MountEntry

UNMOUNT_TIMEOUT_S = 10.0
_LINKS_MAX = 40


def resolve_target(text: str) -> str:
    """
    The absolute path of a mount point, its parents' links resolved, without looking at what is mounted on it.

    Args:
        text: as the user wrote it; may itself be a link to the mount point.

    """
    path = os.path.abspath(text)   # noqa: PTH100 - also of a relative path with ".."; resolve() would look
    for _ in range(_LINKS_MAX):
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))   # noqa: PTH118,PTH119,PTH120
        try:
            link = os.readlink(path)   # noqa: PTH115 - EINVAL for a mounted directory, without asking its file system
        except OSError:
            break
        path = os.path.join(os.path.dirname(path), link)   # noqa: PTH118,PTH120
    return path.rstrip("/") or "/"


def check_target(target: str) -> None:
    """
    Whether a resolved directory can be mounted on.

    Raises:
        TargetError: missing, not a directory, not empty, or a mount point.

    """
    entry = mountapi.mount_at(target)
    if entry is not None:
        kind = f"{entry.fs_type}, {entry.source}"
        raise TargetError(f"{target} is a mount point already ({kind})", hint=f"unmount it: lazyfs umount {target}")
    path = Path(target)
    try:
        if not path.is_dir():
            text = f"{target} is not a directory" if path.exists() else f"{target} does not exist"
            raise TargetError(text, hint=f"make an empty directory: mkdir -p {target}")
        if any(path.iterdir()):
            raise TargetError(f"{target} is not empty", hint="mount on an empty directory")
    except OSError as error:
        raise TargetError(f"{target}: {error.strerror}") from error


def unmount_directly(target: str, *, lazy: bool) -> None:
    """
    Unmount without a worker's help.

    Raises:
        BusyError: in use, and not `lazy`; the message names the processes.
        TargetError: nothing is mounted there. DeadlineError: the kernel does not answer.

    """
    flags = mountapi.MNT_DETACH if lazy else 0
    try:
        call_isolated(mountapi.unmount, target, flags, timeout_s=UNMOUNT_TIMEOUT_S)
    except BusyError as error:
        raise busy_error(target) from error


def busy_error(target: str) -> BusyError:
    """The refusal, with the mounts and the processes that are in the way."""
    below = target.rstrip("/") + "/"
    mounted = [entry.target for entry in mountapi.mounts() if entry.target.startswith(below)]
    who = f"mounts below it: {', '.join(mounted[:10])}" if mounted else f"in use by {describe_holders(target)}"
    if who == "in use by ":
        who = "in use (by whom is not seen from here)"
    hint = "end what uses it, or detach it now and let it go when it is free: lazyfs umount --lazy"
    return BusyError(f"{target} cannot be unmounted: {who}", hint=hint)


def stale_records(directory: WorkerDir) -> list[MountRecord]:
    """Records whose worker has died."""
    return [record for record in directory.records() if not record.worker.alive]


def clean_stale(directory: WorkerDir) -> list[str]:
    """
    Detach what a dead worker has left: its users' mounts, then its FUSE mount, then the records.

    The caller makes sure that no worker lives here (or holds the lock). Returns the targets that were detached. What
    cannot be cleaned keeps its record, for the next try.
    """
    cleaned = []
    for record in stale_records(directory):
        with contextlib.suppress(LazyfsError):
            if is_ours(record, directory):
                unmount_directly(record.target, lazy=True)
                cleaned.append(record.target)
            directory.remove_record(record.slot)
    if not any(record.worker.alive for record in directory.records()):
        while mountapi.mount_at(str(directory.fuse)) is not None:
            unmount_directly(str(directory.fuse), lazy=True)
    return cleaned


def clean_and_remove(directory: WorkerDir) -> list[str]:
    """clean_stale(), then the directory itself; nothing if a worker lives there or is being started."""
    lock = directory.try_lock(make=False)
    if lock is None:
        return []
    try:
        if directory.worker() is not None:
            return []
        cleaned = clean_stale(directory)
        directory.remove()
        return cleaned
    finally:
        os.close(lock)


def clean_all_stale() -> list[str]:
    """clean_and_remove() wherever the worker is dead."""
    return [target for directory in all_worker_dirs() for target in clean_and_remove(directory)]


def is_ours(record: MountRecord, directory: WorkerDir, entries: list[MountEntry] | None = None) -> bool:
    """Whether what is mounted on the record's target now (by `entries`; None: look) is what the record speaks of."""
    entries = mountapi.mounts() if entries is None else entries
    entry = mountapi.mount_at(record.target, entries)
    if entry is None or record.boot_id != read_boot_id():
        return False
    if record.driver == "fuse":
        fuse = mountapi.mount_at(str(directory.fuse), entries)
        return entry.fs_type == "fuse.lazyfs" and (fuse is None or fuse.device == entry.device)
    return entry.fs_type == "erofs" and record.bootstrap.rpartition(":")[2] in entry.source


