"""
The FUSE session: mount, serve, end.

Layer: fs. Who calls: node.serving, node.daemonworker. mount_fuse() comes first, before the process gives up the right
to mount (fs.confine); the mounter unmounts for it. We mount with mount(2) ourselves: a container needs suid and dev,
and a keeper must hold the descriptor. The kernel keeps a connection as long as somebody holds its descriptor; requests
wait. A server that takes it over has what the last one had taken and not answered asked again (Linux 6.9). Answers
must not depend on who gave the last one: fs.inodes, fs.operations.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from typing import TYPE_CHECKING

import trio

from lazyfs.errors import HostError, LazyfsError
from lazyfs.fs import mountapi, wire
from lazyfs.fs.server import FuseServer

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.fs.mounter import MounterClient
    from lazyfs.fs.operations import LazyOperations

FS_TYPE = "fuse.lazyfs"          # the subtype shows in mountinfo and df
BACKGROUND_MIN = 256             # the least MAX_BACKGROUND that a server of a connection ever agreed on
_UNMOUNT_S = 5.0
_log = logging.getLogger("lazyfs.fs")


class FuseSession:
    """
    One mounted FUSE file system. Use: take_over() if others served it, serve() in a task, close() or leave().

    `descriptor`: of /dev/fuse, mounted; the session closes it.
    """

    def __init__(self, operations: LazyOperations, mount_point: Path, descriptor: int) -> None:
        self.mount_point = mount_point
        self._operations = operations
        self._descriptor = descriptor
        self._server: FuseServer | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """How many requests were answered so far, and how many wait for data; -1: the kernel may hold back more."""
        if self._server is None:
            return 0, -1
        waiting_count = self._server.waiting_count
        return self._server.answered_count, waiting_count if waiting_count < BACKGROUND_MIN else -1

    def take_over(self) -> None:
        """Continue a connection that another process has served. Requests wait until serve()."""
        try:
            os.write(self._descriptor, wire.pack_resend())
        except OSError as error:
            if error.errno != errno.EINVAL:    # EINVAL: a kernel that does not know it
                raise
            _log.warning("this kernel cannot send unanswered requests again (Linux 6.9 can): some readers may wait")

    def device(self) -> str:
        """major:minor of the mount, which is also the name of its bdi."""
        entry = mountapi.mount_at(str(self.mount_point))
        return entry.device if entry else ""

    async def serve(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer the kernel until the mount goes away. Cancellation: stops answering."""
        task_status.started()
        self._server = FuseServer(self._operations, self._descriptor)
        await self._server.serve()

    def close(self, mounter: MounterClient) -> None:
        """Unmount (lazily: nothing may keep us) and end the connection; who still waits gets ECONNABORTED."""
        if mountapi.mount_at(str(self.mount_point)):
            try:
                mounter.call("unmount", str(self.mount_point), mountapi.MNT_DETACH, timeout_s=_UNMOUNT_S)
            except LazyfsError as error:   # whoever comes next takes it away (node.unmount)
                _log.warning("%s is left mounted: %s", self.mount_point, error)
        self.leave()

    def leave(self) -> None:
        """Stop serving; the mount and its connection stay for whoever takes them over. serve() has ended."""
        os.close(self._descriptor)


def mount_fuse(mount_point: Path, descriptor: int) -> None:
    """
    Mount. Returns at once; requests wait until a session serves.

    Args:
        mount_point: an existing directory.
        descriptor: of /dev/fuse, which is no mount's yet; it stays open.

    Raises:
        HostError: no right to mount.

    """
    # default_permissions: the kernel checks modes. No MS_NOSUID, no MS_NODEV: a container needs both.
    data = f"fd={descriptor},rootmode={stat.S_IFDIR:o},user_id=0,group_id=0,allow_other,default_permissions"
    mountapi.mount("lazyfs", str(mount_point), FS_TYPE, mountapi.MS_RDONLY, data)


def open_device() -> int:
    """
    Open /dev/fuse, non-blocking (fs.server says why).

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
