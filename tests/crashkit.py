"""
A disk that keeps what was synced, and of the rest what it likes: every state that a power cut may leave.

    with Recorder(root) as recorder:     # what module os does below root is done, and written down
        ...
    recorder.crash(calls, draw, target)  # the tree as a power cut after `calls` of them may leave it

What counts: a write or truncation is kept if its file was synced later; else it may be lost, or kept in some of its
pages, whatever became of those before and after it. A name (made, removed, moved) is kept if its directory was synced
later (of a move both); else it may be lost. fsync of a file keeps none of its names. That is less than any file system
promises, so what survives it survives them. Syncs are written down and not done, which makes thousands of runs cheap.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

PAGE = 4096


@dataclass(frozen=True)
class Call:
    """
    One call that changed something.

    Attributes:
        kind: write, truncate, sync; or of names: link, unlink, move.
        node: the file or directory that it is about.
        places: (directory, name) that it touches; of a move: from, to.

    """

    kind: str
    node: int
    places: tuple[tuple[int, str], ...] = ()
    offset: int = 0
    data: bytes = b""


class Recorder:
    """State: `nodes` is the tree as it is now, by path; node 0 is the root. One thread."""

    def __init__(self, root: Path) -> None:
        self.calls: list[Call] = []
        self._root = str(root)
        self._count = 0
        self._nodes: dict[str, int] = {}
        self._descriptors: dict[int, int] = {}
        self._first: dict[int, dict[str, int]] = {}     # directories, and what was in them in the beginning
        self._directories: set[int] = set()
        self._make(self._root, directory=True)
        for path in sorted(one for one in root.rglob("*") if one.is_dir()):
            self._first[self._nodes[str(path.parent)]][path.name] = self._make(str(path), directory=True)

    def __enter__(self) -> Self:
        wrappers: dict[str, Callable[..., Any]] = {
            "open": self._open, "close": self._close, "pwrite": self._pwrite, "ftruncate": self._ftruncate,
            "fsync": self._sync, "fdatasync": self._sync, "rename": self._rename, "replace": self._rename,
            "unlink": self._unlink, "rmdir": self._unlink, "mkdir": self._mkdir,
        }
        self._real = {name: getattr(os, name) for name in wrappers}
        for name, function in wrappers.items():
            setattr(os, name, function)
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)

    def crash(self, calls: int, draw: Random, target: Path) -> None:
        """The tree in `target`, which does not exist yet, as a power cut after so many calls may leave it."""
        done = self.calls[:calls]
        synced = {call.node: number for number, call in enumerate(done) if call.kind == "sync"}
        entries = {node: dict(names) for node, names in self._first.items()}
        content: dict[int, bytearray] = {}
        for number, call in enumerate(done):
            if call.kind in {"write", "truncate"}:
                share = 1.0 if synced.get(call.node, -1) > number else draw.choice([0.0, 0.5, 1.0])
                _change(content.setdefault(call.node, bytearray()), call, share, draw)
            elif call.kind != "sync":
                kept = all(synced.get(place, -1) > number for place, _ in call.places)
                if kept or draw.random() < 0.5:
                    for place, name in call.places:
                        entries.setdefault(place, {}).pop(name, None)
                    if call.kind != "unlink":
                        place, name = call.places[-1]
                        entries[place][name] = call.node
        self._write_out(0, entries, content, target)

    def _write_out(self, node: int, entries: dict[int, dict[str, int]], content: dict[int, bytearray],
                   target: Path) -> None:
        target.mkdir(mode=0o700)
        for name, one in entries.get(node, {}).items():
            if one in self._directories:
                self._write_out(one, entries, content, target / name)
            else:
                (target / name).write_bytes(content.get(one, b""))

    # --- the calls ----------------------------------------------------------------------------------------------------

    def _make(self, path: str, *, directory: bool = False) -> int:
        node, self._count = self._count, self._count + 1
        self._nodes[path] = node
        if directory:
            self._directories.add(node)
            self._first[node] = {}
        return node

    def _place(self, path: str) -> tuple[int, str]:
        folder, name = os.path.split(path)
        return self._nodes[folder], name

    def _ours(self, path: Any) -> str:
        """The path as text if it is below the root; else ""."""
        text = "" if isinstance(path, int) else os.fspath(path)
        return text if isinstance(text, str) and f"{text}/".startswith(f"{self._root}/") else ""

    def _open(self, path: Any, flags: int, mode: int = 0o777, **options: Any) -> int:
        fd: int = self._real["open"](path, flags, mode, **options)
        text = self._ours(path)
        if text:
            if text not in self._nodes:
                self.calls.append(Call("link", self._make(text), (self._place(text),)))
            elif flags & os.O_TRUNC:
                self.calls.append(Call("truncate", self._nodes[text]))
            self._descriptors[fd] = self._nodes[text]
        return fd

    def _close(self, fd: int) -> None:
        self._descriptors.pop(fd, None)
        self._real["close"](fd)

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        written: int = self._real["pwrite"](fd, data, offset)
        if fd in self._descriptors:
            self.calls.append(Call("write", self._descriptors[fd], (), offset, bytes(data)[:written]))
        return written

    def _ftruncate(self, fd: int, size: int) -> None:
        self._real["ftruncate"](fd, size)
        if fd in self._descriptors:
            self.calls.append(Call("truncate", self._descriptors[fd], (), size))

    def _sync(self, fd: int) -> None:
        if fd in self._descriptors:
            self.calls.append(Call("sync", self._descriptors[fd]))

    def _rename(self, source: Any, target: Any) -> None:
        self._real["rename"](source, target)
        old, new = self._ours(source), self._ours(target)
        if old and new:
            node = self._nodes[old]
            self.calls.append(Call("move", node, (self._place(old), self._place(new))))
            moved = {path: self._nodes.pop(path) for path in list(self._nodes) if f"{path}/".startswith(f"{old}/")}
            self._nodes.update({new + path[len(old):]: one for path, one in moved.items()})

    def _unlink(self, path: Any, **options: Any) -> None:
        is_directory = not options and Path(path).is_dir() and not Path(path).is_symlink()
        self._real["rmdir" if is_directory else "unlink"](path, **options)
        text = self._ours(path)
        if text:
            self.calls.append(Call("unlink", self._nodes.pop(text), (self._place(text),)))

    def _mkdir(self, path: Any, mode: int = 0o777) -> None:
        self._real["mkdir"](path, mode)
        text = self._ours(path)
        if text:
            self.calls.append(Call("link", self._make(text, directory=True), (self._place(text),)))


def _change(data: bytearray, call: Call, share: float, draw: Random) -> None:
    """Do a write or truncation, in so many of its pages."""
    if call.kind == "truncate":
        if share:
            del data[call.offset :]
            data.extend(bytes(call.offset - len(data)))
        return
    for start in range(0, len(call.data), PAGE):
        if draw.random() < share:
            page, at = call.data[start : start + PAGE], call.offset + start
            data.extend(bytes(max(0, at + len(page) - len(data))))
            data[at : at + len(page)] = page
