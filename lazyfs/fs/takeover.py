"""
Continue a FUSE connection whose server has died or stepped aside.

The kernel keeps a connection as long as somebody holds its descriptor; requests wait. A new server must not be told
INIT by the kernel again (it was, once), but libfuse insists on seeing it before anything else. So libfuse begins on a
socket pair that holds a FUSE_INIT of our making; while it handles that (`Operations.init`), and before it waits again,
the real descriptor takes the socket's number (`switch`), and FUSE_NOTIFY_RESEND (Linux 6.9) makes the kernel queue
again whatever the last server had taken and not answered. Later would be too late: the loop would have armed its wait
on the old descriptor. Answers must not depend on who gave the last one: fs.inodes, fs.operations.

Layer: fs. Who calls: fs.session. Source of the structures: Linux include/uapi/linux/fuse.h, protocol 7.38.
"""

from __future__ import annotations

import errno
import os
import socket
import struct

RESEND_KERNEL_MIN = (6, 9)
_FUSE_INIT, _FUSE_NOTIFY_RESEND = 26, 7
_IN_HEADER = struct.Struct("<IIQQIIII")     # len, opcode, unique, nodeid, uid, gid, pid, padding
_OUT_HEADER = struct.Struct("<IiQ")         # len, error (here: the notification), unique
_INIT_IN = struct.Struct("<IIII")           # major, minor, max_readahead, flags
_MAJOR, _MINOR, _MAX_READAHEAD = 7, 38, 128 * 1024
_FLAG_EXTENDED = 1 << 30                    # FUSE_INIT_EXT: a longer structure; all other flags are offered
_UNIQUE = 0xFFFFFFFFFFFFFFF0                # never that of a live request


def begin() -> tuple[int, socket.socket]:
    """
    Make a descriptor on which a FUSE_INIT waits.

    Returns:
        The descriptor, to be given to libfuse, and the socket's other end: close it after `switch`.

    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    body = _INIT_IN.pack(_MAJOR, _MINOR, _MAX_READAHEAD, 0xFFFFFFFF & ~_FLAG_EXTENDED)
    ours.send(_IN_HEADER.pack(_IN_HEADER.size + len(body), _FUSE_INIT, _UNIQUE, 0, 0, 0, 0, 0) + body)
    return theirs.detach(), ours


def switch(session_descriptor: int, fuse_descriptor: int) -> bool:
    """
    Put the connection in the place of the socket, and have unanswered requests sent again.

    Returns:
        Whether the kernel does so (else those requests are lost, and their readers wait until they are killed).

    """
    os.dup2(fuse_descriptor, session_descriptor, inheritable=False)
    try:
        os.write(session_descriptor, _OUT_HEADER.pack(_OUT_HEADER.size, _FUSE_NOTIFY_RESEND, 0))
    except OSError as error:
        if error.errno != errno.EINVAL:    # EINVAL: a kernel that does not know it
            raise
        return False
    return True
