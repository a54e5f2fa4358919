"""
systemd's notification and descriptor-store protocols, as far as the daemon uses them: datagrams of KEY=VALUE lines.

Without NOTIFY_SOCKET every call does nothing. Light to import. Layer: node. Who calls: node.keeper, snapshotter.
Sources: sd_notify(3), sd_listen_fds(3), systemd.service(5) FileDescriptorStoreMax=.
"""

from __future__ import annotations

import contextlib
import os
import socket

LISTEN_FIRST = 3                 # SD_LISTEN_FDS_START
_TIMEOUT_S = 1.0
_WATCHDOG_PARTS = 3              # told three times in the time it allows


def notify(state: str, descriptors: tuple[int, ...] = ()) -> bool:
    """Send lines of KEY=VALUE. Returns whether somebody was told."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(_TIMEOUT_S)
        sender.connect("\0" + address[1:] if address.startswith("@") else address)
        socket.send_fds(sender, [state.encode()], list(descriptors))
        return True
    return False


def store(name: str, descriptor: int) -> bool:
    """Have systemd keep a descriptor over our death; FDPOLL=0, because /dev/fuse polls as broken when it is unused."""
    return notify(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", (descriptor,))


def forget(name: str) -> bool:
    """Have systemd close what it keeps under that name."""
    return notify(f"FDSTOREREMOVE=1\nFDNAME={name}")


def watchdog(now: float) -> None:
    """Tell systemd's watchdog, if it watches us, that all is well; as seldom as it may be. `now`: monotonic."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    if now - _Told.at >= int(microseconds) / 1e6 / _WATCHDOG_PARTS:
        _Told.at = now
        notify("WATCHDOG=1")


class _Told:
    """When the watchdog was told last."""

    at = float("-inf")


def take_stored() -> dict[str, int]:
    """What systemd kept for us, by name; the environment no longer says so afterwards (children are not meant)."""
    pid, count, names = (os.environ.pop(key, "") for key in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    found: dict[str, int] = {}
    for number, name in zip(range(LISTEN_FIRST, LISTEN_FIRST + int(count)), names.split(":"), strict=False):
        os.set_inheritable(number, False)
        if name in found:
            os.close(number)   # stored twice
        else:
            found[name] = number
    return found
