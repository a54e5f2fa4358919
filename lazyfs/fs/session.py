"""
The FUSE session: mount, serve, end.

Layer: fs. Who calls: node.worker. pyfuse3 knows one session a process. We mount with mount(2) ourselves and give
libfuse the descriptor: libfuse's own mount would be nosuid,nodev, and a later keeper must hold the descriptor.
"""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING

import pyfuse3
import trio

from lazyfs.errors import HostError
from lazyfs.fs import drivers, mountapi

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.fs.operations import LazyOperations

FS_TYPE = "fuse.lazyfs"          # the subtype shows in mountinfo and df
_TASKS_MIN = 4                   # idle handlers that are kept
_log = logging.getLogger("lazyfs.fs")


class FuseSession:
    """One mounted FUSE file system. Use: open(), serve() in a task, close()."""

    def __init__(self, operations: LazyOperations, mount_point: Path) -> None:
        self.mount_point = mount_point
        self._operations = operations
        self._closing = False

    def open(self) -> None:
        """
        Mount. Returns at once; requests wait until serve().

        Raises:
            HostError: no /dev/fuse, no right to mount.

        """
        descriptor = open_device()
        try:
            # default_permissions: the kernel checks modes. No MS_NOSUID, no MS_NODEV: a container needs both.
            data = f"fd={descriptor},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other,default_permissions"
            mountapi.mount("lazyfs", str(self.mount_point), FS_TYPE, mountapi.MS_RDONLY, data)
            pyfuse3.init(self._operations, f"/dev/fd/{descriptor}", set())
        except BaseException:
            os.close(descriptor)
            raise

    def device(self) -> str:
        """major:minor of the mount; the minor number names the connection in fusectl and the bdi."""
        entry = mountapi.mount_at(str(self.mount_point))
        return entry.device if entry else ""

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer the kernel until close() or until the mount goes away. Cancellation: stops answering."""
        task_status.started()
        while not self._closing:
            try:
                await pyfuse3.main(min_tasks=_TASKS_MIN, max_tasks=drivers.SESSION_TASKS_MAX)
            except* OSError as group:
                _log.error("reading from /dev/fuse failed, going on: %s", group.exceptions[0])
                await trio.sleep(0.1)
            else:
                return

    def close(self) -> None:
        """Unmount (lazily: nothing may keep us) and end the connection; who still waits gets ECONNABORTED."""
        self._closing = True
        if mountapi.mount_at(str(self.mount_point)):
            mountapi.unmount(str(self.mount_point), mountapi.MNT_DETACH)
        pyfuse3.close(unmount=False)


def open_device() -> int:
    """
    Open /dev/fuse.

    Raises:
        HostError: not there, or not allowed.

    """
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise HostError("there is no /dev/fuse", hint="load it with: modprobe fuse") from error
    except OSError as error:
        hint = "in a container, /dev/fuse must be passed in"
        raise HostError(f"/dev/fuse cannot be opened: {error.strerror}", hint=hint) from error
