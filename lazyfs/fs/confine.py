"""
What a process of ours gives up for good: rights that it does not need, and being looked into.

The worker reads what strangers wrote (registries, bootstraps, lists), so it keeps of root's capabilities only those of
KEPT, and takes no new ones; the mounter (fs.mounter), which reads nothing, mounts for it. It stays user 0: cache,
records and credentials are root's, and a helper that docker's configuration names expects to be run by root.

Layer: fs; light to import. Who calls: node.serving and node.daemonworker, once, while the process has one thread
(capabilities are a thread's; later threads inherit them); the keeper too: hide_memory(). Sources: capabilities(7),
prctl(2), capset(2), core(5). No state.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import time

from lazyfs.fs.seccomp import deny_system_calls

CAP_DAC_READ_SEARCH = 2          # warming opens files of images, whoever they belong to (node.warming)
CAP_NET_BIND_SERVICE = 10        # only with a configured port that needs it
CAP_SYS_PTRACE = 19
KEPT = frozenset({CAP_DAC_READ_SEARCH})
_PORT_PRIVILEGED_MAX = 1023
_CAPABILITY_COUNT = 64           # numbers beyond the kernel's last are refused with EINVAL
_SET_DUMPABLE, _CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT = 4, 24, 38, 47
_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522
_ALONE_S = 5.0                   # for a thread that was joined to go from /proc

_libc = ctypes.CDLL(None, use_errno=True)


def hide_memory() -> None:
    """
    No core file of this process, nor of what it starts, and nobody but root's full powers looks into it.

    Its memory holds registries' passwords and tokens. RLIMIT_CORE alone does not bind a program in core_pattern. In a
    container without CAP_SYS_PTRACE it is all there is: else no later keeper could take our descriptors over.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if capabilities() >> CAP_SYS_PTRACE & 1:
        _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def capabilities() -> int:
    """The permitted capabilities of this thread, a bit each; 0 if the kernel does not say."""
    have = ctypes.create_string_buffer(24)
    if _libc.capget(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), have):
        return 0
    _, low, _, _, high, _ = struct.unpack("=6I", have.raw)
    return int(low | high << 32)


def confine(ports: tuple[int, ...] = ()) -> list[str]:
    """
    Give up all capabilities but KEPT, privileges by exec, and the system calls that fs.seccomp lists.

    Args:
        ports: TCP ports that are still to be listened on.

    Returns: what could not be given up, and why (a container may forbid to forbid); empty: all is done.

    """
    deadline = time.monotonic() + _ALONE_S
    while (threads := len(os.listdir("/proc/self/task"))) != 1:   # noqa: PTH208 - light
        if time.monotonic() > deadline:
            return [f"{threads} threads run already"]
        time.sleep(0.001)
    kept = KEPT | ({CAP_NET_BIND_SERVICE} if any(0 < port <= _PORT_PRIVILEGED_MAX for port in ports) else set())
    problems = []
    for number in range(_CAPABILITY_COUNT):
        if number not in kept and _libc.prctl(_CAPBSET_DROP, number, 0, 0, 0) and ctypes.get_errno() != 22:   # EINVAL
            problems.append(f"bounding set: {os.strerror(ctypes.get_errno())}")
            break
    _libc.prctl(_CAP_AMBIENT, _CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    problems += _set_capabilities(kept)
    if _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return [*problems, f"no_new_privs: {os.strerror(ctypes.get_errno())}"]
    reason = deny_system_calls()
    return [*problems, reason] if reason else problems


def _set_capabilities(kept: frozenset[int] | set[int]) -> list[str]:
    """Effective and permitted: of `kept` what we have; inheritable: none."""
    mask = sum(1 << number for number in kept) & capabilities()
    new = struct.pack("=6I", mask & 0xFFFFFFFF, mask & 0xFFFFFFFF, 0, mask >> 32, mask >> 32, 0)
    if _libc.capset(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), new):
        return [f"capset: {os.strerror(ctypes.get_errno())}"]
    return []
