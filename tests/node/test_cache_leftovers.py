"""What lies about in a cache directory, and cannot be taken away, keeps no device from being used."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.cache.store import CacheDir
from lazyfs.fs import mountapi
from lazyfs.image.digest import Digest
from tests.mountkit import require_mounting

CHUNK = 64 * 1024


@pytest.mark.mount
def test_what_cannot_be_removed_from_a_device_does_not_matter(tmp_path: Path) -> None:
    require_mounting()
    digest, data = Digest.of(b"leftover"), b"x" * CHUNK
    with CacheDir.open(tmp_path / "cache") as cache:
        device = cache.device(digest, CHUNK, CHUNK)
        assert device.write(0, data)
        device.release()
        junk = cache.path / "v1" / digest.hex / "junk"
        junk.mkdir()
        mountapi.mount("none", str(junk), "tmpfs", 0)   # a mount point cannot be removed
        try:
            before = len(list(Path("/proc/self/fd").iterdir()))
            device = cache.device(digest, CHUNK, CHUNK)
            assert device.read(0, CHUNK) == data
            device.release()
            assert len(list(Path("/proc/self/fd").iterdir())) <= before
        finally:
            mountapi.unmount(str(junk))
