"""The kernel, mounting our images file-backed, sees exactly the model; and survives what our reader accepts."""

# ruff: noqa: PTH115, PTH118, PTH123, PTH208  (paths are bytes here, which pathlib has not)

from __future__ import annotations

import os
import random
import stat
from typing import TYPE_CHECKING

import pytest

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.erofs.ondisk import MODE_OF_TYPE
from lazyfs.image.model import Attributes, DataMap, FileType, Inode
from tests.erofskit import (
    CORPUS,
    DEVICE_SIZES,
    content,
    directory,
    mutated,
    paths,
    random_tree,
    regular,
    symlink,
    write_devices,
)
from tests.erofsmount import mounted_erofs, require_erofs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = pytest.mark.mount


@pytest.fixture(autouse=True)
def _kernel() -> None:
    require_erofs()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def compare(root: Inode, target: Path, devices: Sequence[bytes], rng: random.Random) -> None:
    """lstat, readlink, xattrs, names and data of every path."""
    inode_numbers: dict[int, int] = {}
    for path, node in paths(root):
        place = os.path.join(os.fsencode(target), path)
        found = os.lstat(place)
        attributes = node.attributes
        assert found.st_mode == MODE_OF_TYPE[node.type] << 12 | attributes.mode, path
        assert (found.st_uid, found.st_gid, found.st_nlink) == (attributes.uid, attributes.gid, node.link_count), path
        assert found.st_mtime_ns == attributes.mtime_s * 10**9 + attributes.mtime_ns, path
        assert inode_numbers.setdefault(id(node), found.st_ino) == found.st_ino, path
        names = sorted(os.fsencode(name) for name in os.listxattr(place, follow_symlinks=False))
        assert names == [name for name, _ in attributes.xattrs], path
        for name, value in attributes.xattrs:
            assert os.getxattr(place, name, follow_symlinks=False) == value, (path, name)
        if node.type is FileType.DIRECTORY:
            check_directory(place, node)
        elif node.type is FileType.SYMLINK:
            assert os.readlink(place) == node.target
        elif node.type is FileType.REGULAR:
            assert found.st_size == node.size
            check_content(place, node, devices, rng)
        elif node.type in {FileType.CHARACTER, FileType.BLOCK}:
            assert (os.major(found.st_rdev), os.minor(found.st_rdev)) == node.rdev
    assert len(set(inode_numbers.values())) == len(inode_numbers)


def check_directory(place: bytes, node: Inode) -> None:
    with os.scandir(place) as entries:
        found = {entry.name: (entry.is_dir(follow_symlinks=False), entry.is_symlink()) for entry in entries}
    assert found == {
        name: (child.type is FileType.DIRECTORY, child.type is FileType.SYMLINK)
        for name, child in node.children.items()
    }
    with pytest.raises(FileNotFoundError):
        os.lstat(place + b"/zzzz")


def check_content(place: bytes, node: Inode, devices: Sequence[bytes], rng: random.Random) -> None:
    spots = [(0, 5000), (max(node.size - 3000, 0), 5000)]
    spots += [(rng.randrange(max(node.size, 1)), rng.choice([1, 4096, 20000])) for _ in range(3)]
    if node.size < 1 << 20:
        spots.append((0, node.size))
    with open(place, "rb", buffering=0) as file:
        for offset, wanted in spots:
            size = min(wanted, limits.FILE_BYTES_MAX - offset)      # beyond that, pread(2) itself refuses
            assert os.pread(file.fileno(), size, offset) == content(node, devices, offset, size), (place, offset, size)


def mount_and_compare(root: Inode, tmp_path: Path, target: Path) -> None:
    files, contents = write_devices(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(write_image(root, DEVICE_SIZES))
    with mounted_erofs(image, files, target):
        compare(root, target, contents, random.Random(0))


@pytest.mark.parametrize("seed", range(4))
def test_random_trees(seed: int, tmp_path: Path, target: Path) -> None:
    """Many random trees side by side, one mount."""
    rng = random.Random(seed)
    root = directory(**{f"tree{index}": random_tree(rng, 60) for index in range(40)})
    mount_and_compare(root, tmp_path, target)


def test_corners(tmp_path: Path, target: Path) -> None:
    sparse = Inode(FileType.REGULAR, Attributes(), size=1 << 40, data=DataMap(30, ()))
    root = directory(
        empty=regular(),
        hole=sparse,
        most=Inode(FileType.REGULAR, Attributes(), size=limits.FILE_BYTES_MAX),
        piece=Inode(FileType.REGULAR, Attributes(), size=1 << 30, data=DataMap(20, ((1023, 1, 0),))),
        old=regular(1, mtime_s=-(2**40), mtime_ns=999_999_999),
        longest=symlink(b"x/" * 2047 + b"y"),
        deep=directory(**{"d" * 255: directory(**{"e" * 255: directory()})}),
        big=directory(**{f"{index:05}": regular() for index in range(5000)}),
    )
    mount_and_compare(root, tmp_path, target)


@pytest.mark.slow
def test_directory_of_a_hundred_thousand(tmp_path: Path, target: Path) -> None:
    names = {f"entry-{index * 7919 % 100_003}": regular(index % 3) for index in range(100_003)}
    root = directory(big=directory(**names))
    files, _ = write_devices(tmp_path)
    image = tmp_path / "image"
    image.write_bytes(write_image(root, DEVICE_SIZES))
    with mounted_erofs(image, files, target):
        assert sorted(os.listdir(target / "big")) == sorted(names)
        for name in list(names)[::997]:
            assert (target / "big" / name).stat().st_size == names[name].size
        assert not (target / "big" / "entry-").exists()


def test_many_devices(tmp_path: Path, target: Path) -> None:
    """128 layers and more."""
    count = 200
    sizes = (4096,) * count
    files, contents = write_devices(tmp_path, sizes)
    root = directory(**{f"f{index}": regular(4000, device=index) for index in range(count)})
    image = tmp_path / "image"
    image.write_bytes(write_image(root, sizes))
    with mounted_erofs(image, files, target):
        for index in range(count):
            assert (target / f"f{index}").read_bytes() == contents[index][:4000]


def test_kernel_refuses_a_broken_checksum(tmp_path: Path, target: Path) -> None:
    """The kernel does look at our checksum."""
    image = tmp_path / "image"
    data = bytearray(write_image(directory(), ()))
    data[1024 + 20] ^= 1
    image.write_bytes(data)
    with pytest.raises(OSError, match=r"crc32c|checksum|Bad message"), mounted_erofs(image, [], target):
        pass


def walk_all(target: Path) -> int:
    """Touch everything a process can; returns how many names there are. Any errno would raise."""
    count = 0
    for folder, directories, names in os.walk(os.fsencode(target), onerror=_raise):
        for name in directories + names:
            place = os.path.join(folder, name)
            count += 1
            mode = os.lstat(place).st_mode
            for key in os.listxattr(place, follow_symlinks=False):
                read_xattr(place, key)
            if stat.S_ISLNK(mode):
                os.readlink(place)
            elif stat.S_ISREG(mode):
                with open(place, "rb", buffering=0) as file:
                    size = os.fstat(file.fileno()).st_size
                    for offset in (0, size // 2, max(size - 10, 0)):
                        wanted = min(8192, limits.FILE_BYTES_MAX - offset)
                        assert len(os.pread(file.fileno(), wanted, offset)) == min(wanted, size - offset)
    return count


def read_xattr(place: bytes, key: str) -> None:
    try:
        os.getxattr(place, key, follow_symlinks=False)
    except OSError:
        # The kernel looks into the values of these, and says so; user.* and ACLs are not for all types.
        assert key.startswith(("system.posix_acl", "security.capability", "user."))


def _raise(error: OSError) -> None:
    raise error


def test_what_the_reader_accepts_the_kernel_walks(tmp_path: Path, target: Path) -> None:
    """Damaged images that our reader lets through: mounted, walked to the end, no error, same names."""
    files, _ = write_devices(tmp_path)
    image = tmp_path / "image"
    rng = random.Random(20)
    originals = [path.read_bytes() for path in sorted(CORPUS.glob("*.img"))]
    mounts = tries = 0
    while mounts < 300:
        tries += 1
        assert tries < 20_000
        data = mutated(rng, rng.choice(originals))
        if data in originals:
            continue
        try:
            parsed = ErofsImage.parse(data, DEVICE_SIZES)
        except FormatError:
            continue
        image.unlink(missing_ok=True)
        image.write_bytes(data)
        with mounted_erofs(image, files, target):
            assert walk_all(target) == sum(1 for _ in parsed.walk()) - 1
        mounts += 1
