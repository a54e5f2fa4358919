"""
Opening an image whose bootstrap containerd unpacked: what is no file there is told.

It costs no descriptor: the fixture for leaks sees to that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import IntegrityError
from lazyfs.image.bootstrap import HOT_MEMBER
from lazyfs.image.digest import Digest
from lazyfs.node.layers import StoredLayer
from lazyfs.node.opening import _read_unpacked

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["image.json", "hot.bin"])
@pytest.mark.parametrize("kind", ["directory", "pipe", "link", "nothing"])
def test_what_is_no_file(tmp_path: Path, name: str, kind: str) -> None:
    for one in ("image.json", "tables.bin", "hot.bin", "image.erofs"):
        (tmp_path / "lazyfs").mkdir(exist_ok=True)
        (tmp_path / "lazyfs" / one).write_bytes(b"x")
    path = tmp_path / "lazyfs" / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/etc/passwd")
    expected = "expected" if f"lazyfs/{name}" == HOT_MEMBER else "is not there"     # without it, it is another image
    with pytest.raises(IntegrityError, match=expected):
        _read_unpacked(StoredLayer(Digest.of(b""), 0, 0), tmp_path / "cache", str(tmp_path))
