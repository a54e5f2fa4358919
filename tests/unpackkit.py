"""
What an image's layers must look like, from three independent sides: the references of the differential tests.

    stack.unpack_plain(top / "plain", layers)       # all layers one after another in one directory: containerd "native"
    stack.unpack_overlay(top / "overlay", layers)   # each in an upper directory of its own: containerd "overlayfs"
    unpack_umoci(layout, tag, top / "umoci")        # somebody else's code altogether

The first two apply a layer with plain system calls in a child process that has chroot'ed into the tree: the kernel
and not our code says what a path means. Nothing of lazyfs or converter is used here, and nothing of a tar: an Item is
what the test's author meant, tarbuilder writes it for those who read archives. Source: OCI image-spec v1.1 layer.md.
"""

# ruff: noqa: PTH101, PTH102, PTH108, PTH112, PTH114, PTH115, PTH119, PTH120, PTH123, PTH208, PTH211 (paths are bytes)
from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import stat
import subprocess
import traceback
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_HOPS_MAX = 40                   # symlinks on one way, as Linux
ACCESS_ACL, DEFAULT_ACL = "system.posix_acl_access", "system.posix_acl_default"


@dataclass(frozen=True, repr=False)
class Item:
    """One entry of a layer. `kind`: file, directory, symlink, link, char, block, fifo, whiteout, opaque."""

    kind: str
    path: bytes
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: tuple[int, int] = (0, 0)
    xattrs: tuple[tuple[str, bytes], ...] = ()
    size: int = 0
    segments: tuple[tuple[int, bytes], ...] = ()     # of a file; what lies between them is a hole
    target: bytes = b""
    rdev: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        text = f"{self.kind} {self.path!r} {self.mode:o} {self.uid}:{self.gid} {self.mtime}"
        text += f" {dict(self.xattrs)}" if self.xattrs else ""
        text += f" size={self.size} at={[(o, len(d)) for o, d in self.segments]}" if self.kind == "file" else ""
        text += f" -> {self.target!r}" if self.target else ""
        return f"<{text}{f' dev={self.rdev}' if self.rdev[0] else ''}>"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:
        printer.text(repr(self))      # hypothesis would print a dataclass field by field

    @property
    def hides(self) -> bool:
        return self.kind in {"whiteout", "opaque"}

    @property
    def mtime_ns(self) -> int:
        return self.mtime[0] * 10**9 + self.mtime[1]


@dataclass
class State:
    """What the file system itself cannot tell from layer to layer."""

    listed: dict[bytes, int] = field(default_factory=dict)   # directories that an entry names: their mtime_ns
    implied: set[bytes] = field(default_factory=set)         # directories that nobody lists: their time is unknown
    refused: dict[int, str] = field(default_factory=dict)    # of the last layer: entries that cannot be applied, why
    # Unclear things that umoci refuses or takes as they stand: a file of a lower layer in a parent's place (in
    # overlayfs it gives way), whiteouts behind a loop of symlinks, or behind a symlink that the layer itself replaces.
    beyond_umoci: bool = False

    @property
    def implied_paths(self) -> set[bytes]:
        """As snapshots name them, without the slash."""
        return {path[1:] for path in self.implied}


class RefusedError(Exception):
    """The entry cannot be applied: NO_TARGET, LOOP or BELOW_FILE."""


NO_TARGET = "a hard link to what is not there, or is a directory"
LOOP = "symlinks that lead nowhere"
BELOW_FILE = "a parent that is a file of the same layer"


def apply_layer(top: Path, items: Sequence[Item], state: State) -> State:
    """Apply one layer to the tree at `top`, in a child with that root. Returns the new state; `refused` of this one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reading)
            os.umask(0)
            os.chroot(top)
            os.chdir("/")
            with os.fdopen(writing, "wb") as pipe:
                try:
                    result: object = _Applier(state).apply(items)
                except BaseException as error:  # noqa: BLE001 - shown by the parent
                    result = f"{error!r}\n{traceback.format_exc()}"
                pickle.dump(result, pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    result = pickle.loads(data)
    assert isinstance(result, State), result
    return result


class _Applier:
    """Runs with the tree as its root directory. All paths begin with a slash, the root is b""."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.fresh: set[bytes] = set()        # non-directories made by this layer

    def apply(self, items: Sequence[Item]) -> State:
        self.state.refused = {}
        # layer.md: whiteouts apply to lower layers only, and may stand anywhere in the archive. So they come first.
        # A symlink in whose place this layer puts something else is not followed on the way to what they hide.
        own = {b"/" + item.path for item in items if not item.hides}
        hidden = []
        for item in items:
            try:
                if item.kind == "opaque" and (path := self.real(item.path, own)) is not None:
                    hidden += [path + b"/" + name for name in _children(path)]
                elif item.kind == "whiteout" and (path := self.real(os.path.dirname(item.path), own)) is not None:
                    hidden.append(path + b"/" + os.path.basename(item.path))
            except RefusedError:
                self.state.beyond_umoci = True
        for path in hidden:
            self.remove(path)
        for number, item in enumerate(items):
            if not item.hides:
                try:
                    self.add(item)
                except RefusedError as error:
                    self.state.refused[number] = str(error)
        # Making and removing names has changed the times of directories; entries of any layer speak of the end.
        for path, mtime_ns in self.state.listed.items():
            os.utime(path or b"/", ns=(mtime_ns, mtime_ns))
        return self.state

    def real(self, path: bytes, stop: set[bytes] | frozenset[bytes] = frozenset()) -> bytes | None:
        """The path with its symlinks followed, as far as it exists. None: through a symlink in `stop`."""
        done, todo, hops = b"", path.split(b"/"), 0
        while todo:
            name = todo.pop(0)
            full = done + b"/" + name
            if name in (b"", b"."):
                continue
            if name == b"..":
                done = done.rpartition(b"/")[0]
            elif os.path.islink(full):
                hops += 1
                if full in stop:
                    self.state.beyond_umoci = True
                    return None
                if hops > _HOPS_MAX:
                    raise RefusedError(LOOP)
                target = os.readlink(full)
                done = b"" if target.startswith(b"/") else done
                todo = target.split(b"/") + todo
            else:
                done = full
        return done

    def add(self, item: Item) -> None:
        if not item.path:
            assert item.kind == "directory"
            self.set_attributes(b"", item)
            return
        parent = self.real(os.path.dirname(item.path))
        assert parent is not None
        path = parent + b"/" + os.path.basename(item.path)
        source = b""
        self.check_parents(parent)
        if item.kind == "link":
            folder = self.real(os.path.dirname(item.target))
            assert folder is not None
            source = folder + b"/" + os.path.basename(item.target)
            # The name is cleared before the link is made: what is in it or below it cannot be linked to any more.
            # So is a file that gives way to a parent of the new name.
            cleared = (source + b"/").startswith(path + b"/") or (parent + b"/").startswith(source + b"/")
            if cleared or not os.path.lexists(source) or _is_directory(source):
                raise RefusedError(NO_TARGET)
        self.make_parents(parent)
        if os.path.lexists(path) and not (item.kind == "directory" and _is_directory(path)):
            self.remove(path)
        self.make(path, item, source)
        if item.kind != "directory":
            self.fresh.add(path)
        # The fields of a hard link's own header are not applied (GNU tar, umoci): in honest layers they are those of
        # the inode, and containerd, which applies them, comes to the same.
        if item.kind != "link":
            self.set_attributes(path, item)

    def check_parents(self, parent: bytes) -> None:
        """A file below a file of the same layer: containerd and umoci both fail (ENOTDIR)."""
        while parent:
            if parent in self.fresh and not _is_directory(parent):
                raise RefusedError(BELOW_FILE)
            parent = parent.rpartition(b"/")[0]

    def make_parents(self, path: bytes) -> None:
        if not path or _is_directory(path):
            return
        self.make_parents(path.rpartition(b"/")[0])
        if os.path.lexists(path):      # in overlayfs the upper directory simply lies over the lower file
            self.state.beyond_umoci = True
            self.remove(path)
        os.mkdir(path, 0o755)
        # What mkdir(2) inherits (ACLs; group and bit of a setgid directory) nobody said is in the image: containerd
        # and umoci leave it there, as a side effect of unpacking. Ours are 0755, root's, without more.
        for name in os.listxattr(path):
            os.removexattr(path, name)
        os.chown(path, 0, 0)
        os.chmod(path, 0o755)
        self.state.implied.add(path)

    def make(self, path: bytes, item: Item, source: bytes) -> None:
        if item.kind == "directory":
            if not _is_directory(path):
                os.mkdir(path)
        elif item.kind == "symlink":
            os.symlink(item.target, path)
        elif item.kind == "link":
            os.link(source, path, follow_symlinks=False)
        elif item.kind == "file":
            with open(path, "xb") as file:
                file.truncate(item.size)
                for offset, data in item.segments:
                    file.seek(offset)
                    file.write(data)
        else:
            kind = {"char": stat.S_IFCHR, "block": stat.S_IFBLK, "fifo": stat.S_IFIFO}[item.kind]
            os.mknod(path, kind | 0o600, os.makedev(*item.rdev))

    def set_attributes(self, path: bytes, item: Item) -> None:
        """Owner first, for it clears capabilities and setuid; the entry replaces all attributes that were there."""
        real = path or b"/"
        os.chown(real, item.uid, item.gid, follow_symlinks=False)
        for name in os.listxattr(real, follow_symlinks=False):
            os.removexattr(real, name, follow_symlinks=False)
        for name, value in item.xattrs:
            try:
                os.setxattr(real, name, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in {errno.EPERM, errno.ENOTSUP}:     # containerd warns and goes on
                    raise
        if item.kind != "symlink":
            os.chmod(real, item.mode)
        os.utime(real, ns=(item.mtime_ns, item.mtime_ns), follow_symlinks=False)
        if item.kind == "directory":
            self.state.listed[path] = item.mtime_ns
            self.state.implied.discard(path)

    def remove(self, path: bytes) -> None:
        if not os.path.lexists(path):
            return
        if _is_directory(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)
        for known in [*self.state.listed, *self.state.implied, *self.fresh]:
            if (known + b"/").startswith(path + b"/"):
                self.state.listed.pop(known, None)
                self.state.implied.discard(known)
                self.fresh.discard(known)


def _is_directory(path: bytes) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _children(path: bytes) -> list[bytes]:
    return os.listdir(path or b"/") if not path or _is_directory(path) else []


# --- whole stacks -----------------------------------------------------------------------------------------------------


def unpack_plain(top: Path, layers: Sequence[Sequence[Item]]) -> tuple[State, list[dict[int, str]]]:
    """All layers into the one directory `top`. Returns what is refused of each layer, too."""
    top.mkdir()
    top.chmod(0o755)
    state, refused = State(implied={b""}), []
    for items in layers:
        state = apply_layer(top, items, state)
        refused.append(state.refused)
    return state, refused


@contextlib.contextmanager
def unpacked_overlay(top: Path, layers: Sequence[Sequence[Item]]) -> Iterator[Path]:
    """Each layer into an upper directory over those before; the block sees the whole stack, read-only."""
    top.mkdir()
    merged = top / "merged"
    merged.mkdir()
    uppers: list[Path] = []
    state = State(implied={b""})
    for index, items in enumerate(layers):
        upper, work = top / f"{index}", top / f"{index}.work"
        upper.mkdir()
        work.mkdir()
        if uppers:
            _copy_root(uppers[-1], upper)
            options = f"lowerdir={':'.join(map(str, reversed(uppers)))},upperdir={upper},workdir={work}"
            with mounted("overlay", merged, options):
                state = apply_layer(merged, items, state)
        else:
            upper.chmod(0o755)
            state = apply_layer(upper, items, state)
        uppers.append(upper)
    below = top / "below"        # overlayfs wants two lower directories where there is no upper one
    below.mkdir()
    with mounted("overlay", merged, f"lowerdir={':'.join(map(str, reversed(uppers)))}:{below}"):
        yield merged


def _copy_root(lower: Path, upper: Path) -> None:
    """The root directory of an overlay is that of its upper directory: a layer that does not name it keeps it."""
    found = lower.stat()
    os.chown(upper, found.st_uid, found.st_gid)
    for name in os.listxattr(lower):
        if not name.startswith("trusted.overlay."):
            os.setxattr(upper, name, os.getxattr(lower, name))
    upper.chmod(stat.S_IMODE(found.st_mode))
    os.utime(upper, ns=(found.st_mtime_ns, found.st_mtime_ns))


def unpack_umoci(layout: Path, tag: str, top: Path) -> Path:
    """Raises AssertionError with umoci's words."""
    words = ["umoci", "raw", "unpack", "--image", f"{layout}:{tag}", str(top)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    return top


@contextlib.contextmanager
def mounted(kind: str, target: Path, options: str, source: str = "reference") -> Iterator[Path]:
    """A mount for the length of the block."""
    words = ["mount", "-t", kind, "-o", options, source, str(target)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, f"{result.stderr} options {options}"
    try:
        yield target
    finally:
        subprocess.run(["umount", str(target)], check=True, timeout=60)
