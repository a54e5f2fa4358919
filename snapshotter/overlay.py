"""
What containerd is told to mount: bind for one directory, overlay for more, as its own overlayfs snapshotter does.

Layer: snapshotter, above model. Who calls: core. Pure but for `probe`. Shapes (containerd's overlay plugin):

    no parent          bind, rw or ro (a View), rbind
    View, one below    bind of the one below, ro, rbind
    else               overlay: workdir, upperdir (not for a View), lowerdir top first, then the node's options

Lower directories are absolute and short; containerd itself makes them relative where they exceed a page.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapshotter.failures import SnapshotInvalidError
from snapshotter.model import LABEL_GID_MAPPING, LABEL_UID_MAPPING, Kind, Mount

if TYPE_CHECKING:
    from collections.abc import Mapping

_INDEX = Path("/sys/module/overlay/parameters/index")
_INITIAL_MAP = ("0", "0", "4294967295")
_REMAP_KERNEL = (5, 19)          # overlayfs on id-mapped lower directories
_ID_MAX = 2**32 - 1              # not an id itself: (uid_t) -1


@dataclass(frozen=True, slots=True)
class OverlayOptions:
    """`options`: appended to every overlay. `remap_ids`: containerd may be told to id-map the mounts."""

    options: tuple[str, ...]
    remap_ids: bool


def probe(root: Path) -> OverlayOptions:
    """Find out which options the kernel wants; `root`: a directory of ours on the file system it is about."""
    options: list[str] = []
    if _in_user_namespace() and _takes_user_xattr(root):
        options.append("userxattr")
    if _INDEX.exists():
        options.append("index=off")
    release = os.uname().release.split("-")[0].split(".")
    return OverlayOptions(tuple(options), (int(release[0]), int(release[1])) >= _REMAP_KERNEL)


def mounts(kind: Kind, own: Path, lowers: list[Path], node: OverlayOptions, labels: Mapping[str, str]) -> list[Mount]:
    """
    Say how to mount an active snapshot or a view.

    Args:
        kind: ACTIVE or VIEW.
        own: its directory, which holds fs/ and, if active, work/.
        lowers: what is below, top first.
        node: options of this machine.
        labels: of the snapshot; id mappings become mount options, for containerd to apply.

    """
    options = _id_maps(labels) if node.remap_ids else []
    if not lowers:
        return [Mount("bind", str(own / "fs"), (*options, "rw" if kind is Kind.ACTIVE else "ro", "rbind"))]
    if kind is Kind.VIEW and len(lowers) == 1:
        return [Mount("bind", str(lowers[0]), (*options, "ro", "rbind"))]
    if kind is Kind.ACTIVE:
        options += [f"workdir={own / 'work'}", f"upperdir={own / 'fs'}"]
    options.append("lowerdir=" + ":".join(map(str, lowers)))
    return [Mount("overlay", "overlay", (*options, *node.options))]


def mapped_root(labels: Mapping[str, str]) -> tuple[int, int] | None:
    """
    Who root of the container is outside: uid, gid; None if the labels map nothing.

    Raises:
        SnapshotInvalidError: a mapping does not parse, or does not map root.

    """
    if LABEL_UID_MAPPING not in labels and LABEL_GID_MAPPING not in labels:
        return None
    return _host_root(labels.get(LABEL_UID_MAPPING, "")), _host_root(labels.get(LABEL_GID_MAPPING, ""))


def _host_root(mapping: str) -> int:
    """`mapping`: containerID:hostID:size[,...]; an empty one maps each id to itself."""
    if not mapping:
        return 0
    for part in mapping.split(","):
        words = part.split(":")
        if len(words) != 3 or not all(word.isascii() and word.isdigit() and int(word) < _ID_MAX for word in words):
            raise SnapshotInvalidError(f"id mapping {mapping!r}: {part!r} is not containerID:hostID:size")
        inside, outside, size = map(int, words)
        if inside == 0 and size > 0:
            return outside
    raise SnapshotInvalidError(f"id mapping {mapping!r} does not map root")


def _id_maps(labels: Mapping[str, str]) -> list[str]:
    pairs = (("uidmap", LABEL_UID_MAPPING), ("gidmap", LABEL_GID_MAPPING))
    return [f"{option}={labels[label]}" for option, label in pairs if label in labels]


def _in_user_namespace() -> bool:
    return tuple(Path("/proc/self/uid_map").read_text(encoding="ascii").split()) != _INITIAL_MAP


def _takes_user_xattr(root: Path) -> bool:
    """Older tmpfs do not."""
    try:
        os.setxattr(root, "user.overlay.probe", b"")
        os.removexattr(root, "user.overlay.probe")
    except OSError:
        return False
    return True
