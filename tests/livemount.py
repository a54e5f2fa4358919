"""
`lazyfs` as a user calls it, and lazy images mounted for the length of a block.

    with live_mount(reference, tmp_path / "m", driver="fuse", cache=tmp_path / "cache") as top: ...

The command runs in a process of its own; `quick_mount` asks a worker that lives already (for many mounts).
Importing this gives the session a run directory of its own, so that several test sessions on one machine (whose
fixtures look for what was left behind, and clear it) do not take each other's mounts away.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.node.launch import mount_image
from lazyfs.node.order import MountOrder
from lazyfs.node.unmounting import unmount_target

if TYPE_CHECKING:
    from collections.abc import Iterator

LAZYFS = Path(sys.executable).with_name("lazyfs")
DRIVERS = ("erofs", "fuse")

if "LAZYFS_RUN_DIR" not in os.environ:
    os.environ["LAZYFS_RUN_DIR"] = f"/run/lazyfs-test-{os.getpid()}"
    atexit.register(shutil.rmtree, os.environ["LAZYFS_RUN_DIR"], ignore_errors=True)


def lazyfs(*words: object, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run the command; fails the test, with what it said, if it fails."""
    command = [str(LAZYFS), *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: exit code {result.returncode}\n{result.stdout}{result.stderr}"
    return result


@contextlib.contextmanager
def live_mount(reference: str, target: Path, *, cache: Path, driver: str = "auto") -> Iterator[Path]:
    target.mkdir(exist_ok=True)
    lazyfs("mount", "--driver", driver, "--cache-dir", cache, reference, target)
    try:
        yield target
    finally:
        lazyfs("umount", target)


@contextlib.contextmanager
def quick_mount(reference: str, target: Path, *, cache: Path, driver: str) -> Iterator[Path]:
    """As live_mount, from within this process. Some live_mount with that cache must be there already."""
    target.mkdir(exist_ok=True)
    order = MountOrder(image=reference, target=str(target), driver=driver)
    mount_image(order, str(cache)).close()
    try:
        yield target
    finally:
        unmount_target(str(target), lazy=False, force=False)
