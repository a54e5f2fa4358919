"""
The run directory: who serves what, for everybody who comes later (umount, the next mount, a person).

    /run/lazyfs/<worker id>/          one a cache directory; the id is made of its path; `daemon`: the node daemon's
        lock                          flock: who starts or ends a worker here
        control.sock                  the worker's control socket (node.protocol)
        worker.json                   which process it is
        worker.log                    its messages
        fuse/                         its FUSE mount
        mounts/<slot>.json            one record a mount
        numbers.json                  the next device index and slot, for a worker that takes over
        contributor                   of a daemon that sends profiles: a secret (node.uploads)
        keeper.json, keeper.sock      of the daemon: which process keeps the descriptors, where it is asked

Layer: node. Nothing here is trusted further than root is: mode 0700. A record outlives its worker; whether the worker
lives is told by pid, start time and boot, never by the pid alone. LAZYFS_RUN_DIR names another place (for tests).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lazyfs.errors import HostError

_RECORD_BYTES_MAX = 1 << 20
# How reading a file fails that is not there, or is not what we write.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, not to be mistaken for a later one with the same pid. `start_ticks`: field 22 of proc(5) stat."""

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """None: no such process, or one that has ended and was not collected yet."""
        try:
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            boot_id = read_boot_id()
        except OSError:
            return None
        rest = text.rpartition(")")[2].split()
        return None if rest[0] in "ZX" else cls(pid, int(rest[19]), boot_id)

    @property
    def alive(self) -> bool:
        return ProcessIdentity.of(self.pid) == self


@dataclass(frozen=True, slots=True)
class MountRecord:
    """
    One mount: for who comes later, and for a worker that takes over.

    Attributes:
        image: as the user wrote it.
        bootstrap: digest of its bootstrap layer; `layer_size`, `raw_size`: stored and uncompressed.
        mount_id: of proc(5) mountinfo; 0: about to be mounted.
        device_indexes: of dev/<index>, in the image's order; -1: the kernel reads the cache's own file.
        detached: gone from its target, still in use.
        order: node.order.MountOrder as JSON; it may hold a password, and the file is for root only.
        was_read: somebody has read from it.

    """

    target: str
    image: str
    driver: str
    bootstrap: str
    cache_dir: str
    slot: int
    pid: int
    start_ticks: int
    boot_id: str
    mount_id: int = 0
    layer_size: int = 0
    raw_size: int = 0
    device_indexes: list[int] = field(default_factory=list)
    bdi_names: list[str] = field(default_factory=list)
    detached: bool = False
    order: dict[str, Any] = field(default_factory=dict, repr=False)
    was_read: bool = False

    @property
    def worker(self) -> ProcessIdentity:
        return ProcessIdentity(self.pid, self.start_ticks, self.boot_id)


@dataclass(frozen=True, slots=True)
class WorkerDir:
    """The directory of the worker of one cache directory."""

    root: Path

    @classmethod
    def of_cache(cls, cache_dir: str) -> WorkerDir:
        """`cache_dir`: absolute and resolved, so that one directory has one worker."""
        return cls(run_root() / hashlib.sha256(os.fsencode(cache_dir)).hexdigest()[:12])

    @property
    def socket(self) -> Path:
        return self.root / "control.sock"

    @property
    def identity(self) -> Path:
        return self.root / "worker.json"

    @property
    def keeper_identity(self) -> Path:
        return self.root / "keeper.json"

    @property
    def keeper_socket(self) -> Path:
        return self.root / "keeper.sock"

    @property
    def numbers(self) -> Path:
        return self.root / "numbers.json"

    @property
    def log(self) -> Path:
        return self.root / "worker.log"

    @property
    def seed(self) -> Path:
        return self.root / "seed"

    @property
    def handed(self) -> Path:
        """A mark: somebody hands credentials to our workers."""
        return self.root / "credentials-handed-over"

    @property
    def contributor(self) -> Path:
        """The secret that names this node to collectors of profiles, another name for each image."""
        return self.root / "contributor"

    @property
    def fuse(self) -> Path:
        return self.root / "fuse"

    @property
    def mounts(self) -> Path:
        return self.root / "mounts"

    def create(self) -> None:
        """
        Make the directories.

        Raises:
            HostError: not possible here.

        """
        for last in (False, False, False, True):
            try:
                run_root().mkdir(mode=0o700, parents=True, exist_ok=True)
                # os.mkdir, because Path.mkdir(exist_ok=True) looks at what is there: on fuse/ may be a dead mount
                for path in (self.root, self.mounts, self.fuse):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(path, 0o700)   # noqa: PTH102
            except OSError as error:
                if last or error.errno != errno.ENOENT:   # the last mount's worker may just be removing it
                    text = f"cannot make {error.filename}: {error.strerror}"
                    raise HostError(text, hint="mounting needs root") from error
            else:
                return

    def try_lock(self, *, make: bool = True) -> int | None:
        """
        Take the directory's lock without waiting: the right to start a worker here, or to remove the directory.

        Args:
            make: the directory, if it is not there. Not to remove it: two who do that would make it again in turns.

        Returns:
            A descriptor that holds the lock until it is closed; None: somebody else has it, or there is nothing.

        """
        path = self.root / "lock"
        if make:
            self.create()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None   # a worker that was ending has removed the directory again
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        except (BlockingIOError, FileNotFoundError):
            pass   # the second: its last holder has removed the directory meanwhile
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def worker(self) -> ProcessIdentity | None:
        """The process that serves here, if it lives."""
        with contextlib.suppress(*_UNREADABLE):
            identity = ProcessIdentity(**json.loads(self.identity.read_bytes()))
            return identity if identity.alive else None
        return None

    def keeper(self) -> ProcessIdentity | None:
        """The daemon's keeper, if it lives: a worker that dies here is followed by another."""
        with contextlib.suppress(*_UNREADABLE):
            data = json.loads(self.keeper_identity.read_bytes())
            identity = ProcessIdentity(int(data["pid"]), int(data["start_ticks"]), str(data["boot_id"]))
            return identity if identity.alive else None
        return None

    def write_worker(self, identity: ProcessIdentity) -> None:
        """Store atomically; on a full file system in place of the last one. Raises OSError: there was none."""
        try:
            _write_json(self.identity, asdict(identity))
        except OSError:   # readers of mounts wait for us, and the old file's block is there to be used
            descriptor = os.open(self.identity, os.O_WRONLY | os.O_CLOEXEC)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                json.dump(asdict(identity), file)
                file.truncate()

    def remove(self) -> None:
        """
        Remove the directory, if no mount is on record; its lock is held by the caller.

        Files go one by one: nothing here may ever reach into a mount that is still there.
        """
        if list(self.mounts.glob("*.json")):
            return
        with contextlib.suppress(OSError):
            for path in (*self.root.glob("*.tmp"), *self.mounts.glob("*.tmp")):   # of a worker killed while it wrote
                path.unlink(missing_ok=True)
            for path in self.root.glob("fetch-*.json"):   # that nobody goes on with
                path.unlink(missing_ok=True)
            for path in (self.fuse, self.mounts):
                with contextlib.suppress(FileNotFoundError):   # whoever made the directory was killed over it
                    os.rmdir(path)   # noqa: PTH106 - refuses a mount point, and looks at nothing
            for path in (self.socket, self.identity, self.seed, self.log, self.numbers, self.keeper_identity,
                         self.keeper_socket, self.handed, self.contributor, self.root / "lock"):
                path.unlink(missing_ok=True)
            self.root.rmdir()

    def write_record(self, record: MountRecord) -> None:
        """Store atomically. Raises OSError."""
        _write_json(self.mounts / f"{record.slot}.json", asdict(record))

    def write_numbers(self, next_device: int, next_slot: int) -> None:
        """Store atomically: no worker after this one may give a number below these. Raises OSError."""
        _write_json(self.numbers, [next_device, next_slot])

    def read_numbers(self) -> tuple[int, int]:
        """What write_numbers() stored last; (0, 1) if nothing."""
        with contextlib.suppress(*_UNREADABLE):
            device, slot = json.loads(self.numbers.read_bytes())
            return int(device), int(slot)
        return 0, 1

    def remove_record(self, slot: int) -> None:
        (self.mounts / f"{slot}.json").unlink(missing_ok=True)

    def write_fetch(self, name: str, value: dict[str, Any]) -> None:
        """Store atomically what was asked for by `cache fetch`, under a file name of its own. Raises OSError."""
        _write_json(self.root / f"fetch-{name}.json", value)

    def remove_fetch(self, name: str) -> None:
        (self.root / f"fetch-{name}.json").unlink(missing_ok=True)

    def fetches(self) -> dict[str, Any]:
        """What write_fetch() stored, by name; what cannot be read is left out."""
        found = {}
        for path in sorted(self.root.glob("fetch-*.json")):
            with contextlib.suppress(*_UNREADABLE):
                found[path.stem.removeprefix("fetch-")] = json.loads(path.read_bytes()[:_RECORD_BYTES_MAX])
        return found

    def records(self) -> list[MountRecord]:
        """All readable records, whoever wrote them: another version of us may know more fields, or fewer."""
        found = []
        for path in sorted(self.mounts.glob("*.json")):
            with contextlib.suppress(*_UNREADABLE):
                data = json.loads(path.read_bytes()[:_RECORD_BYTES_MAX])
                known = {one.name: data[one.name] for one in fields(MountRecord) if one.name in data}
                found.append(MountRecord(**known))   # TypeError: one without a default is not there
        return found


def daemon_dir() -> WorkerDir:
    """The directory of this node's daemon, whether it runs or not."""
    return WorkerDir(run_root() / "daemon")


def read_boot_id() -> str:
    """Which boot of the machine this is."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def run_root() -> Path:
    """Of this machine. Raises ConfigError: the configuration says, but cannot be read."""
    named = os.environ.get("LAZYFS_RUN_DIR")
    if named:
        return Path(named)
    from lazyfs import config  # noqa: PLC0415 - start-up time

    return Path(config.load().daemon.run_dir)


def all_worker_dirs() -> list[WorkerDir]:
    """Every worker's directory that exists, of live and dead workers."""
    with contextlib.suppress(OSError):
        return [WorkerDir(path) for path in sorted(run_root().iterdir()) if (path / "mounts").is_dir()]
    return []


def find_record(target: str) -> tuple[WorkerDir, MountRecord] | None:
    """The newest record of a mount on `target` (absolute, resolved); of a live worker if there is one."""
    found = [(directory, record) for directory in all_worker_dirs() for record in directory.records()
             if record.target == target]
    found.sort(key=lambda pair: (pair[1].worker.alive, pair[1].slot))
    return found[-1] if found else None
