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
from lazyfs.fs import drivers, loop, mountapi, takeover

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.fs.operations import LazyOperations

FS_TYPE = "fuse.lazyfs"          # the subtype shows in mountinfo and df
_log = logging.getLogger("lazyfs.fs")


class FuseSession:
    """
    One mounted FUSE file system. Use: open() or take_over(), serve() in a task, close().

    `descriptor`: of /dev/fuse, opened by somebody who keeps it (the keeper); else the session opens its own.
    """

    def __init__(self, operations: LazyOperations, mount_point: Path, descriptor: int | None = None) -> None:
        self.mount_point = mount_point
        self._operations = operations
        self._kept_descriptor = descriptor

    def open(self) -> None:
        """
        Mount. Returns at once; requests wait until serve().

        Raises:
            HostError: no /dev/fuse, no right to mount.

        """
        descriptor = open_device() if self._kept_descriptor is None else os.dup(self._kept_descriptor)
        try:
            # default_permissions: the kernel checks modes. No MS_NOSUID, no MS_NODEV: a container needs both.
            data = f"fd={descriptor},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other,default_permissions"
            mountapi.mount("lazyfs", str(self.mount_point), FS_TYPE, mountapi.MS_RDONLY, data)
            self._start(descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def take_over(self) -> None:
        """Continue the mounted connection of the kept descriptor. Requests wait until serve()."""
        kept = self._kept_descriptor
        assert kept is not None
        session, feed = takeover.begin()

        def switch() -> None:
            if not takeover.switch(session, kept):
                _log.warning("this kernel cannot send unanswered requests again (Linux 6.9 can): some readers may wait")
            feed.close()

        self._operations.on_init = switch
        try:
            self._start(session)
        except BaseException:
            feed.close()
            os.close(session)
            raise

    def _start(self, descriptor: int) -> None:
        self._operations.before_wait = loop.install().hand_over
        pyfuse3.init(self._operations, f"/dev/fd/{descriptor}", set())

    def device(self) -> str:
        """major:minor of the mount; the minor number names the connection in fusectl and the bdi."""
        entry = mountapi.mount_at(str(self.mount_point))
        return entry.device if entry else ""

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer the kernel until the mount goes away. Cancellation: stops answering."""
        task_status.started()
        # no reader is ever "one too many" (min_tasks): one that ends while the lock is free would leave nobody to read
        await pyfuse3.main(min_tasks=drivers.SESSION_TASKS_MAX, max_tasks=drivers.SESSION_TASKS_MAX)

    def close(self) -> None:
        """Unmount (lazily: nothing may keep us) and end the connection; who still waits gets ECONNABORTED."""
        if mountapi.mount_at(str(self.mount_point)):
            mountapi.unmount(str(self.mount_point), mountapi.MNT_DETACH)
        pyfuse3.close(unmount=False)

    def leave(self) -> None:
        """Stop serving; the mount and its connection stay for whoever takes them over. serve() has ended."""
        pyfuse3.close(unmount=False)


def open_device() -> int:
    """
    Open /dev/fuse, non-blocking (fs.loop says why).

    Raises:
        HostError: not there, or not allowed.

    """
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise HostError("there is no /dev/fuse", hint="load it with: modprobe fuse") from error
    except OSError as error:
        hint = "in a container, /dev/fuse must be passed in"
        raise HostError(f"/dev/fuse cannot be opened: {error.strerror}", hint=hint) from error
