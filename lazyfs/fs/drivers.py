"""
The two drivers: what is mounted on the user's directory, and the kernel's knobs for it.

`erofs`: the kernel's EROFS on the bootstrap, its extra devices being files of our FUSE mount (or, where a layer
device is completely cached, the cache's own file: native speed, no Python). File-backed: Linux >= 6.12.
`fuse`: a bind mount of the tree that our FUSE mount serves itself.

Layer: fs. Who calls: fs.mounter runs mount_erofs and mount_tree in its children; node.worker chooses. Light to import
(the mounter is forked before anything heavy is loaded). Measurements: docs/design.md, feasibility/README.md.
"""

from __future__ import annotations

import contextlib
import enum
import os
from pathlib import Path

from lazyfs.errors import HostError
from lazyfs.fs import mountapi

EROFS_KERNEL_MIN = (6, 12)       # file-backed mounts
BDI_DIR = Path("/sys/class/bdi")
# While an image is fetched on demand, large read-ahead fetches more than a start needs; 128 KiB was the optimum for a
# cold start of tensorflow. Once all is on the node, large requests read big files twice as fast, and larger ones
# still where no worker is between (docs/readpath.md).
READ_AHEAD_STARTING_KIB = 128
READ_AHEAD_LOCAL_KIB = 4096
READ_AHEAD_NATIVE_KIB = 6144
READ_AHEAD_RECORDING_KIB = 4     # one page: nothing is taken for asked for that was read ahead (docs/profile-run.md)
READ_AHEAD_HOT_KIB = 4           # while an image with a hot part starts (node.hotstart)
READ_AHEAD_FUSE_KIB = 256        # driver fuse; larger fetches more than a start needs


class Driver(enum.StrEnum):
    EROFS = "erofs"
    FUSE = "fuse"


def choose_driver(wanted: str) -> Driver:
    """
    Turn auto|erofs|fuse into a driver of this kernel.

    Raises:
        HostError: erofs was asked for by name and this kernel cannot.

    """
    if wanted == "fuse":
        return Driver.FUSE
    reason = erofs_obstacle()
    if reason and wanted == "erofs":
        raise HostError(f"driver erofs: {reason}", hint="use --driver fuse, or auto")
    return Driver.FUSE if reason else Driver.EROFS


def erofs_obstacle() -> str:
    """Why driver erofs cannot work here, or ""."""
    version = mountapi.kernel_version()
    if version < EROFS_KERNEL_MIN:
        need = ".".join(map(str, EROFS_KERNEL_MIN))
        return f"Linux {os.uname().release} is older than {need}, the first to mount EROFS from a file"
    if not mountapi.kernel_knows("erofs"):
        return "this kernel has no EROFS"
    return ""


def mount_erofs(source: str, target: str, devices: list[str]) -> list[str]:
    """
    Mount a bootstrap's EROFS image file on `target`; data is read past the page cache of the device files.

    Args:
        source: the image file.
        target: an existing directory.
        devices: the layer devices' files, in order.

    Returns:
        Names under /sys/class/bdi that are new: this mount's (of two mounted at the same time maybe both).

    """
    before = set(_bdi_names())
    options: list[tuple[str, str | None]] = [*(("device", device) for device in devices), ("directio", None)]
    mountapi.mount_by_context("erofs", source, target, options)
    return sorted(set(_bdi_names()) - before)


def mount_tree(source: str, target: str) -> list[str]:
    """Bind `source`, the tree of an image on our FUSE mount, to `target`. (suid, dev, ro: the FUSE mount's.)"""
    mountapi.mount(source, target, "", mountapi.MS_BIND)
    return []


def set_read_ahead(bdi_names: list[str], size_kib: int, *, ours: bool = False) -> None:
    """
    Set read-ahead; a name that is gone is skipped. A hint, so failure is silent.

    A mount of one page keeps it, for it is recorded, or starts: a name may be that of somebody else's mount
    (mount_erofs). `ours`: it is not.
    """
    for name in bdi_names:
        with contextlib.suppress(OSError):
            file = BDI_DIR / name / "read_ahead_kb"
            if ours or file.read_text(encoding="ascii").strip() != str(READ_AHEAD_RECORDING_KIB):
                file.write_text(str(size_kib), encoding="ascii")


def read_ahead_kib(names: list[str]) -> int:
    """The largest of some names; 0: none is there."""
    sizes = [0]
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            sizes.append(int((BDI_DIR / name / "read_ahead_kb").read_text(encoding="ascii")))
    return max(sizes)


def _bdi_names() -> list[str]:
    with contextlib.suppress(OSError):
        return [path.name for path in BDI_DIR.iterdir()]
    return []
