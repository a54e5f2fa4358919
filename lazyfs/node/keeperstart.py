"""
What a keeper keeps, and where it gets it from: fresh, from systemd's store, out of a worker without keeper, or from
its own process image before an upgrade.

Light to import. Layer: node. Who calls: node.keeper. State: the descriptors, and keeper.json, which says their numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import sys
from typing import Any, NoReturn

from lazyfs.node import notify
from lazyfs.node.keeperchild import fetch_descriptor

_FILES = ("control.sock", "keeper.sock", "keeper.json", "worker.json", "numbers.json", "worker.log",
          "credentials-handed-over")   # node.rundir says what they are; the lock goes last
_MNT_DETACH = 2                  # umount2(2)
_BACKLOG = 64                    # requests that wait for the next worker
EXIT_HOST, EXIT_BUSY = 40, 42    # as in lazyfs.errors, which would have to be imported


class Kept:
    """
    The descriptors, and what is known of them.

    Attributes:
        fuse: of /dev/fuse. listener: of the control socket. lock: of the run directory.
        begun: the connection was mounted and answered INIT; it can be taken over, not begun again.
        worker_pid: a worker that serves already; 0: none.

    """

    def __init__(self, root: str, lock: int) -> None:
        self.root = root
        self.lock = lock
        self.fuse = -1
        self.listener = -1
        self.begun = False
        self.worker_pid = 0

    def renew_fuse(self) -> None:
        """Give the connection up, if there is one: whoever still waits in it gets an error."""
        if self.fuse >= 0:
            os.close(self.fuse)
        notify.forget("fuse")
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        self.begun = False

    @property
    def is_aborted(self) -> bool:
        """Whether the connection was begun and is no more: unmounted, or aborted through fusectl. Nobody can go on."""
        poll = select.poll()
        poll.register(self.fuse, 0)
        return self.begun and any(what & select.POLLERR for _, what in poll.poll(0))

    def write_identity(self, cache_dir: str) -> None:
        """Say who keeps what: for the keeper after us, and for `lazyfs mount`."""
        identity = {**_identity(os.getpid()), "cache_dir": cache_dir, "fuse": self.fuse, "listener": self.listener}
        temporary = f"{self.root}/keeper.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(identity, file)
        os.replace(temporary, f"{self.root}/keeper.json")  # noqa: PTH105 - light

    @property
    def has_mounts(self) -> bool:
        """Whether mounts are on record: somebody may read from them."""
        return any(name.endswith(".json") for name in _names(f"{self.root}/mounts"))

    def let_go(self) -> None:
        """No worker is left: nor is anything else, but for mounts of one that stepped aside (SIGTERM to all of us)."""
        if self.has_mounts:
            print("lazyfs keeper: its mounts are left: they are served again if the next start gets the connection "
                  "(systemd)", file=sys.stderr, flush=True)
            return
        notify.forget("fuse")
        notify.forget("control")
        self.remove()

    def remove(self) -> None:
        """
        Nothing is served any more: take our files away. Refuses, as rmdir(2) does, where something is left.

        A worker that was told to step aside, not to leave (SIGTERM to all of us), has left the FUSE mount there.
        """
        ctypes.CDLL(None).umount2(os.fsencode(f"{self.root}/fuse"), _MNT_DETACH)
        halves = [f"{folder}/{name}" for folder in (self.root, f"{self.root}/mounts") for name in _names(folder)
                  if name.endswith(".tmp")]   # of a worker that was killed while it wrote
        for path in (*(f"{self.root}/{name}" for name in _FILES), *halves):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108 - light
        with contextlib.suppress(OSError):
            for name in ("fuse", "mounts"):
                os.rmdir(f"{self.root}/{name}")  # noqa: PTH106 - light
            os.unlink(f"{self.root}/lock")  # noqa: PTH108 - light
            os.rmdir(self.root)  # noqa: PTH106 - light


def find_kept(root: str, resume: dict[str, Any] | None) -> Kept:
    """
    Take the run directory's lock, and find or make the descriptors.

    Exits with a clear line if another keeper has the directory, or there is no /dev/fuse.

    """
    if resume:
        kept = Kept(root, resume["lock"])
        kept.fuse, kept.listener, kept.begun = resume["fuse"], resume["listener"], resume["begun"]
        for descriptor in (kept.lock, kept.fuse, kept.listener, resume["channel"]):
            os.set_inheritable(descriptor, False)
        return kept
    kept = Kept(root, _lock(root))
    stored = notify.take_stored()
    worker = _live(_read(f"{root}/worker.json"))
    if "fuse" in stored and "control" in stored:
        kept.fuse, kept.listener, kept.begun = stored["fuse"], stored["control"], True
        kept.worker_pid = worker["pid"] if worker else 0
        return kept
    if worker:
        keeper = _read(f"{root}/keeper.json") or {}
        try:
            kept.fuse = fetch_descriptor(worker["pid"], int(keeper["fuse"]))
            kept.listener = fetch_descriptor(worker["pid"], int(keeper["listener"]))
        except (OSError, LookupError, ValueError) as error:
            _refuse(f"worker {worker['pid']} serves, and its descriptors cannot be had: {error}",
                    f"stop what uses its mounts, then: kill {worker['pid']}", EXIT_BUSY)
        kept.begun, kept.worker_pid = True, worker["pid"]
        return kept
    try:
        kept.renew_fuse()
    except OSError as error:
        _refuse(f"/dev/fuse cannot be opened: {error.strerror}", "load it with: modprobe fuse", EXIT_HOST)
    kept.listener = listen(root, "control.sock", _BACKLOG).detach()
    return kept


def listen(directory: str, name: str, backlog: int) -> socket.socket:
    """A unix socket for root only, in place of what is there. By descriptor: sockaddr_un holds 108 bytes."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{name}")  # noqa: PTH108 - light
    server = socket.socket(socket.AF_UNIX)
    place = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(0o177)
    try:
        server.bind(f"/proc/self/fd/{place}/{name}")
    finally:
        os.umask(mask)
        os.close(place)
    server.listen(backlog)
    server.setblocking(False)
    return server


def _lock(root: str) -> int:
    descriptor = os.open(f"{root}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        keeper = _read(f"{root}/keeper.json") or {}
        who = keeper.get("pid", "unknown")
        _refuse(f"{root} is in use by process {who}", "there is one daemon a node: lazyfs daemon status", EXIT_BUSY)
    return descriptor


def _names(directory: str) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(directory)  # noqa: PTH208 - light
    return []


def _read(path: str) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:  # noqa: PTH123 - light
        data = json.load(file)
        return data if isinstance(data, dict) else None
    return None


def _live(recorded: dict[str, Any] | None) -> dict[str, Any] | None:
    """The recorded process, if it is still that one (node.rundir.ProcessIdentity, without its imports)."""
    if recorded is None:
        return None
    with contextlib.suppress(OSError, LookupError, TypeError, ValueError):
        found = _identity(int(recorded["pid"]))
        if all(found[key] == recorded[key] for key in found):
            return recorded
    return None


def _identity(pid: int) -> dict[str, Any]:
    """Raises OSError, LookupError: no such process, or one that has ended."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123 - light
        rest = file.read().rpartition(")")[2].split()
    if rest[0] in "ZX":
        raise LookupError(pid)
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:  # noqa: PTH123 - light
        return {"pid": pid, "start_ticks": int(rest[19]), "boot_id": file.read().strip()}


def _refuse(text: str, hint: str, code: int) -> NoReturn:
    print(f"lazyfs: error: {text}\nhint: {hint}", file=sys.stderr)
    sys.exit(code)
