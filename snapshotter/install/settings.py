"""
What each version of containerd needs to use the snapshotter, as paths and values of its configuration.

Layer: snapshotter.install. Sources: containerd's docs/PLUGINS.md, docs/cri/config.md, docs/transfer.md; the fields of
its own configuration. Three shapes:

- file version 2 (containerd 1.6, 1.7; 2.x still reads it): CRI's settings in plugins."io.containerd.grpc.v1.cri".
- file version 3 (2.x): CRI's image settings in plugins."io.containerd.cri.v1.images".
- from 2.1 on CRI pulls through the transfer service: it unpacks with the snapshotters of `unpack_config` only, and
  hands down annotations if the proxy plugin exports that it wants them. A list replaces the built-in one (overlayfs),
  so overlayfs is named too. Before 2.1, CRI itself must be told to hand annotations down.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.errors import UnsupportedError

if TYPE_CHECKING:
    from snapshotter.install.version import Version

NAME = "lazyfs"
CRI_2, CRI_3 = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"
TRANSFER = "io.containerd.transfer.v1.local"
_REMAP_KERNEL = (5, 19)          # overlayfs on id-mapped layers


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `append`: `value` is a list of tables, added to what is there, by their `snapshotter`."""

    path: tuple[str, ...]
    value: Any
    append: bool = False

    def __str__(self) -> str:
        return ".".join(part if part.replace("_", "").isalnum() else f"'{part}'" for part in self.path)


def settings_for(version: Version, file_version: int, *, address: str, root: str, cri: bool) -> list[Setting]:
    """
    What has to be set.

    Args:
        version: containerd's.
        file_version: of its configuration, see choose_file_version().
        address: the snapshotter's socket.
        root: the snapshotter's directory.
        cri: whether CRI (kubelet) shall use it for all its images.

    """
    proxy = ("proxy_plugins", NAME)
    found = [Setting((*proxy, "type"), "snapshot"), Setting((*proxy, "address"), address)]
    if version.knows_capabilities and _kernel() >= _REMAP_KERNEL:
        found.append(Setting((*proxy, "capabilities"), ["remap-ids"]))
    if version.knows_exports:
        found.append(Setting((*proxy, "exports", "root"), root))
    if version.pulls_by_transfer:
        found.append(Setting((*proxy, "exports", "enable_remote_snapshot_annotations"), "true"))
        names = [{"platform": "linux", "snapshotter": name} for name in (NAME, "overlayfs")]
        found.append(Setting(("plugins", TRANSFER, "unpack_config"), names, append=True))
    if cri:
        tables: list[tuple[str, ...]] = [("plugins", CRI_2, "containerd")] if file_version == 2 else []
        if version.major >= 2:   # in a file of version 2 too: the older table is migrated only if it has `runtimes`
            tables.append(("plugins", CRI_3))
        for table in tables:
            found.append(Setting((*table, "snapshotter"), NAME))
            if not version.pulls_by_transfer:
                found.append(Setting((*table, "disable_snapshot_annotations"), False))
    return found


def choose_file_version(version: Version, document: dict[str, Any]) -> int:
    """
    The version of a configuration file to write: the one it has, or the newest that this containerd reads.

    Raises:
        UnsupportedError: it is of a kind that has to be migrated first.

    """
    newest = 3 if version.major >= 2 else 2
    if "version" not in document:
        if document:   # version 1, by containerd's rule: plugins have other names there
            how = "containerd --config FILE config migrate" if version.major >= 2 else (
                "write plugins' names in full, and begin it with: version = 2")
            raise UnsupportedError("containerd's configuration is of version 1 (it names none)",
                                   hint=f"migrate it first: {how}")
        return newest
    found = document["version"]
    if isinstance(found, bool) or found not in (2, 3) or found > newest:
        raise UnsupportedError(f"containerd's configuration has version {found!r:.20}: expected 2"
                               f"{' or 3' if newest == 3 else ''} for containerd {version}",
                               hint="migrate it first: containerd --config FILE config migrate")
    return int(found)


def _kernel() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(char for char in minor if char.isdigit()) or 0)
