"""
`lazyfs umount`: by the worker if it lives and answers, else without it. Layer: node. Who calls: cli.mount.

Never hangs: every step has a deadline (node.protocol, fs.isolate), and nothing looks into the mount.
"""

from __future__ import annotations

import time

from lazyfs.errors import BusyError, DeadlineError, TargetError
from lazyfs.fs import mountapi
from lazyfs.node.protocol import UNMOUNT, ControlClient, WorkerGoneError
from lazyfs.node.rundir import MountRecord, WorkerDir, find_record
from lazyfs.node.unmount import busy_error, clean_and_remove, unmount_directly

_ANSWER_S = 15.0                 # above the worker's own bound for one umount2
_ANSWER_FORCED_S = 5.0           # --force does not wait long for a worker that hangs
_POLL_S = 0.02
_END_S = 10.0                    # for the worker to end after its last mount


def unmount_target(target: str, *, lazy: bool, force: bool) -> None:
    """
    Unmount a lazy image.

    Raises:
        BusyError: in use, and neither lazy nor force. TargetError: no lazyfs mount. DeadlineError: nobody answers.

    """
    found = find_record(target)
    if found is None:
        entry = mountapi.mount_at(target)
        what = "nothing is mounted there" if entry is None else f"a {entry.fs_type} mount, but not one of lazyfs"
        raise TargetError(f"{target}: {what}", hint="lazyfs mounts are listed in /run/lazyfs/*/mounts")
    directory, record = found
    if directory.keeper() is not None:
        _ask_daemon(directory, record, lazy=lazy, force=force)
        return
    if not record.worker.alive:
        _clean(directory, target)
        return
    try:
        _ask_or_detach(directory, record, lazy=lazy, force=force)
    except WorkerGoneError:
        if not _wait_gone(target):   # it was ending, and takes everything with it
            _clean(directory, target)


def _ask_daemon(directory: WorkerDir, record: MountRecord, *, lazy: bool, force: bool) -> None:
    """A worker that dies meanwhile, or has just died, is followed by another, which is asked again."""
    deadline = time.monotonic() + _ANSWER_S
    while True:
        try:
            _ask_or_detach(directory, record, lazy=lazy, force=force)
        except WorkerGoneError:
            if directory.keeper() is None or time.monotonic() > deadline:
                raise DeadlineError("the daemon's worker does not answer", hint="lazyfs daemon status") from None
            time.sleep(_POLL_S)
            if not any(one.slot == record.slot for one in directory.records()):
                return   # the last one did it, and died before it could say so
        else:
            return


def _ask_or_detach(directory: WorkerDir, record: MountRecord, *, lazy: bool, force: bool) -> None:
    try:
        _ask_worker(directory, record, lazy=lazy, force=force)
    except DeadlineError:
        if not (lazy or force):
            raise
        if mountapi.mount_at(record.target) is not None:   # else it was only slow
            unmount_directly(record.target, lazy=True)   # the worker hangs; it finds out when it is back


def _ask_worker(directory: WorkerDir, record: MountRecord, *, lazy: bool, force: bool) -> None:
    timeout_s = _ANSWER_FORCED_S if force else _ANSWER_S
    with ControlClient.connect(directory.socket) as client:
        try:
            answer = client.request(UNMOUNT, timeout_s, target=record.target, lazy=lazy, force=force)
        except BusyError as error:
            if mountapi.mount_at(record.target) is None:
                raise
            raise busy_error(record.target) from error
    # The last mount's worker ends now: when this command returns, nothing of it is left.
    deadline = time.monotonic() + _END_S
    while answer["ending"] and record.worker.alive and time.monotonic() < deadline:
        time.sleep(0.01)


def _wait_gone(target: str) -> bool:
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline:
        if find_record(target) is None:
            return True
        time.sleep(_POLL_S)
    return False


def _clean(directory: WorkerDir, target: str) -> None:
    cleaned = clean_and_remove(directory)
    if target not in cleaned and mountapi.mount_at(target) is not None:
        raise TargetError(f"{target}: what is mounted there is not what its dead worker had mounted",
                          hint=f"look at it, then: umount {target}")
