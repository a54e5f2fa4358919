"""Our own processes, sockets and directories. Layer: doctor."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs import __version__
from lazyfs.doctor.results import failed, ok, warning
from lazyfs.fs import mountapi
from lazyfs.node.protocol import HEALTH, ControlClient, WorkerGoneError
from lazyfs.node.rundir import WorkerDir

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.doctor.results import Result, Subject

_ANSWER_S = 5.0
_LOCAL = frozenset({"ext4", "ext3", "ext2", "xfs", "btrfs", "f2fs", "zfs", "bcachefs"})
_REMOTE = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse", "virtiofs", "vboxsf"})


def check_daemon(subject: Subject) -> Iterator[Result]:
    directory = WorkerDir(Path(subject.config.daemon.run_dir) / "daemon")
    start = "systemctl start lazyfs, or: lazyfs daemon"
    if directory.root.parent.exists() and not os.access(directory.root.parent, os.X_OK):
        yield failed("daemon", f"{directory.root.parent} is private to root", "run this as root")
        return
    try:
        with ControlClient.connect(directory.socket, _ANSWER_S) as client:
            health = client.request(HEALTH, _ANSWER_S)
    except WorkerGoneError as error:
        worker = directory.worker()
        if worker is not None:
            yield failed("daemon", f"worker {worker.pid} lives, but does not answer: {error}", "look at its log")
        else:
            yield failed("daemon", "does not run", start)
        return
    broken = health.get("broken", [])
    if not health.get("ready"):
        yield failed("daemon", "is not ready", "wait a moment; else look at its log")
    elif broken:
        yield warning("daemon", f"{len(broken)} of its images cannot be served, first {broken[0]['image']}: "
                      f"{broken[0]['reason']}", "it tries again by itself; lazyfs daemon status lists them")
    elif health.get("version") != __version__:
        yield warning("daemon", f"runs version {health.get('version')}, installed is {__version__}",
                      "lazyfs daemon upgrade")
    else:
        yield ok("daemon", f"ready, version {health['version']}, {health['mounts']} mounts")
    cache = os.path.realpath(subject.config.daemon.cache_dir)
    if health.get("cache_dir", cache) != cache:
        yield warning("cache directory", f"the daemon uses {health['cache_dir']}, configured is {cache}",
                      "restart it with nothing mounted, or configure what it uses")


def check_log(subject: Subject) -> Iterator[Result]:
    path = subject.config.log.file
    if not path:
        return
    directory = Path(path).parent
    if Path(path).is_dir() or not directory.is_dir():
        yield failed("log", f"{path} cannot be written: {directory} is no directory" if not directory.is_dir() else
                     f"{path} is a directory", "set log.file; until then it all goes to standard error")
    else:
        yield ok("log", f"goes to {path}")


def check_sockets(subject: Subject) -> Iterator[Result]:
    run_dir = Path(subject.config.daemon.run_dir)
    paths = [run_dir / "daemon" / "control.sock", run_dir / "daemon" / "keeper.sock",
             Path(subject.config.snapshotter.address)]
    there = [path for path in paths if os.path.lexists(path)]
    wrong = [path for path in there if not stat.S_ISSOCK(path.lstat().st_mode)]
    # what is in a directory of root's cannot be reached by others, whatever its own mode
    wide = [path for path in there if _others_may(path.lstat()) and _others_may(path.parent.stat())]
    foreign = [path for path in there if path.lstat().st_uid not in {0, os.geteuid()}]
    for found, text, hint in ((wrong, "is no socket", "stop what made it, and remove it"),
                              (wide, "can be used by others than root", "chmod 600, and restart what made it"),
                              (foreign, "belongs to another user", "stop what made it, and remove it")):
        if found:
            yield failed("sockets", f"{found[0]} {text}", hint)
            return
    yield ok("sockets", f"{len(there)} of {len(paths)} are there, for root only")


def check_cache(subject: Subject) -> Iterator[Result]:
    path = Path(subject.config.daemon.cache_dir)
    yield from _check_file_system("cache", path, overlay_is_fatal=False)
    status = os.statvfs(_nearest(path))
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    floor = subject.config.cache.free_floor_bytes.of(total)
    share = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free"
    if free < floor:
        yield failed("disk space", f"{share}: below the floor of {floor / 1e9:.1f} GB",
                     "make room, or set cache.free_floor_bytes, or another daemon.cache_dir")
    elif free < 2 * floor:
        yield warning("disk space", f"{share}: near the floor of {floor / 1e9:.1f} GB", "make room: lazyfs cache")
    else:
        yield ok("disk space", share)
    if status.f_files and status.f_favail < max(1000, status.f_files // 100):
        yield failed("inodes", f"{status.f_favail} of {status.f_files} are free", "remove what holds many small files")
    if path.exists() and _others_may(path.stat()):
        yield warning("cache", f"{path} can be entered by others than root", f"chmod 700 {path}")


def check_snapshotter_root(subject: Subject) -> Iterator[Result]:
    yield from _check_file_system("snapshots", Path(subject.config.snapshotter.root), overlay_is_fatal=True)


def _check_file_system(name: str, path: Path, *, overlay_is_fatal: bool) -> Iterator[Result]:
    there = _nearest(path)
    if not there.is_dir():
        yield failed(name, f"{there} is no directory", "configure another place")
        return
    kind = _file_system(there)
    if kind.partition(".")[0] in _REMOTE:
        yield failed(name, f"{path} is on {kind}", "put it on a local disk: a network that hangs would hang containers")
    elif kind == "overlay" and overlay_is_fatal:
        yield failed(name, f"{path} is on overlayfs, which cannot be the upper layer of another",
                     "put it on a file system of its own (in a container: a volume)")
    elif kind in {"tmpfs", "ramfs"}:
        yield warning(name, f"{path} is in memory", "put it on a disk: what is cached is gone after a reboot")
    elif kind in _LOCAL:
        yield ok(name, f"{path} is on {kind}")
    else:
        yield warning(name, f"{path} is on {kind}, which lazyfs was not tried on", "ext4 and xfs are")


def _file_system(path: Path) -> str:
    """Of the mount that holds it; asks proc only, so that a dead server cannot hang it."""
    real = os.path.realpath(path)
    best, kind = "", ""
    for entry in mountapi.mounts():
        inside = real == entry.target or real.startswith(entry.target.rstrip("/") + "/")
        if inside and len(entry.target) >= len(best):
            best, kind = entry.target, entry.fs_type
    return kind


def _nearest(path: Path) -> Path:
    """The directory itself, or the nearest above it that is there."""
    while not os.path.lexists(path) and path != path.parent:
        path = path.parent
    return path


def _others_may(status: os.stat_result) -> bool:
    return bool(status.st_mode & 0o077)
