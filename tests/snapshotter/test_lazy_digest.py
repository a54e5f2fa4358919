"""The digest of an unpacked bootstrap is its layer's diff-id, with a hot part and without; what is amiss is told."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import IntegrityError
from lazyfs.image.bootstrap import HOT_MEMBER, pack_bootstrap, pack_unpacked
from lazyfs.image.digest import Digest
from snapshotter.lazydigest import bootstrap_digest
from tests.formatkit import make_bootstrap

if TYPE_CHECKING:
    from pathlib import Path

DEVICES = [bytes(range(256)) * 512, b"x" * 4096]
HOT = pack_bootstrap(make_bootstrap(DEVICES, hot=[(3, 0, 9), (0, 1, 1)]))
COLD = pack_bootstrap(make_bootstrap(DEVICES))


def unpacked(tar: bytes, directory: Path) -> Path:
    subprocess.run(["tar", "x", "-C", str(directory)], input=tar, check=True)
    (directory / "lazyfs").chmod(0o755)
    return directory


def read(directory: Path, name: str) -> bytes | None:
    return (directory / name).read_bytes() if (directory / name).exists() else None


@pytest.mark.parametrize("tar", [HOT, COLD], ids=["hot", "cold"])
def test_it_is_the_digest_of_the_tar(tmp_path: Path, tar: bytes) -> None:
    directory = unpacked(tar, tmp_path)
    assert bootstrap_digest(directory) == Digest.of(tar).text
    assert pack_unpacked(lambda name: read(directory, name)) == tar


def test_a_hot_part_that_is_gone_or_another_makes_another_digest(tmp_path: Path) -> None:
    directory = unpacked(HOT, tmp_path)
    path = directory / HOT_MEMBER
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + b"\7")
    assert bootstrap_digest(directory) != Digest.of(HOT).text
    path.unlink()
    assert bootstrap_digest(directory) != Digest.of(HOT).text


@pytest.mark.parametrize("kind", ["link", "directory", "pipe"])
def test_a_hot_part_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = unpacked(HOT, tmp_path) / HOT_MEMBER
    path.unlink()
    if kind == "link":
        path.symlink_to("/etc/passwd")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(IntegrityError, match=r"hot\.bin"):
        bootstrap_digest(tmp_path)
