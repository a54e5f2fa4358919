"""The tar reader against GNU tar and Python's tarfile: what they write of a real tree is read as the tree is."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from converter.tar import TarReader
from lazyfs.image.model import EntryKind, FileType, LayerEntry

IS_ROOT = os.geteuid() == 0
TYPES = {stat.S_IFREG: FileType.REGULAR, stat.S_IFDIR: FileType.DIRECTORY, stat.S_IFLNK: FileType.SYMLINK,
         stat.S_IFCHR: FileType.CHARACTER, stat.S_IFBLK: FileType.BLOCK, stat.S_IFIFO: FileType.FIFO}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that a file system has and tar can say."""
    root = tmp_path_factory.mktemp("tree")
    (root / "d/e").mkdir(parents=True)
    (root / "d").chmod(0o1777)
    (root / "empty").touch()
    (root / "data").write_bytes(os.urandom(70_000))
    (root / "data").chmod(0o6755)
    (root / ("long" * 60)).write_bytes(b"x" * 512)
    deep = root / "/".join(["component" * 5] * 9)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"leaf")
    (root / "link").symlink_to("d/../data")
    (root / "longlink").symlink_to("t/" * 150)
    os.link(root / "data", root / "d/hard")
    Path(os.fsdecode(bytes(root) + b"/\xff\xfename \xc3\xa9")).write_bytes(b"bytes")
    os.mkfifo(root / "fifo")
    with (root / "sparse").open("wb") as file:
        for offset in (0, 1 << 20, 5 << 20, 9 << 20, 20 << 20, 30 << 20):
            file.seek(offset)
            file.write(b"data" * 1100)
        file.truncate(1 << 30)
    with (root / "hole").open("wb") as file:
        file.truncate(1 << 33)
    if IS_ROOT:
        os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(root / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
        os.chown(root / "empty", 65_534, 2_000_000_000)
        capability = b"\1\0\0\2" + bytes(16)
        for name, value in (("user.x", b"\0\n=1"), ("security.capability", capability), ("trusted.t", b"")):
            os.setxattr(root / "data", name, value)
    for path in root.rglob("*"):
        if not path.is_dir():
            os.utime(path, ns=(0, 1_234_567_890_123_456_789), follow_symlinks=False)
    os.utime(root / "empty", ns=(0, -1_500_000_000))
    return root


def read_tree(archive: bytes) -> dict[bytes, tuple[LayerEntry, list[tuple[int, bytes]]]]:
    reader = TarReader(io.BytesIO(archive), name="layer")
    found = {}
    for member in reader:
        found[member.entry.path] = (
            member.entry, [(offset, reader.read_data(length)) for offset, length in member.segments])
    assert not reader.dropped
    return found


def check(tree: Path, archive: bytes, *, has_ns: bool, has_xattrs: bool, is_sparse: bool) -> None:
    found = read_tree(archive)
    assert sorted(found) == sorted([b"", *(bytes(path.relative_to(tree)) for path in tree.rglob("*"))])
    for name, (entry, segments) in found.items():
        path = tree / os.fsdecode(name)
        info = path.lstat()
        if entry.kind is EntryKind.HARDLINK:
            assert path.samefile(tree / os.fsdecode(entry.target))
            continue
        attributes = entry.attributes
        assert entry.type is TYPES[stat.S_IFMT(info.st_mode)]
        assert attributes.mode == stat.S_IMODE(info.st_mode)
        assert (attributes.uid, attributes.gid) == (info.st_uid, info.st_gid)
        if has_ns:
            assert attributes.mtime_s * 10**9 + attributes.mtime_ns == info.st_mtime_ns
        else:   # GNU tar rounds -1.5 s down, tarfile up
            assert attributes.mtime_s in {info.st_mtime_ns // 10**9, int(info.st_mtime)}
        if has_xattrs and entry.type is FileType.REGULAR:
            assert dict(attributes.xattrs) == {key.encode(): os.getxattr(path, key) for key in os.listxattr(path)}
        if entry.type is FileType.SYMLINK:
            assert entry.target == os.readlink(bytes(path))  # noqa: PTH115  # a Path drops the slash at its end
        if entry.type in {FileType.CHARACTER, FileType.BLOCK}:
            assert entry.rdev == (os.major(info.st_rdev), os.minor(info.st_rdev))
        if entry.type is FileType.REGULAR:
            assert entry.size == info.st_size
            check_data(path, segments, info.st_size)
            if is_sparse:
                assert sum(len(data) for _, data in segments) < 1 << 20


def check_data(path: Path, segments: list[tuple[int, bytes]], size: int) -> None:
    """All data of the file is in the segments, and the segments are in the file."""
    with path.open("rb") as file:
        for offset, data in segments:
            assert os.pread(file.fileno(), len(data), offset) == data
        covered = 0
        for offset, data in [*segments, (size, b"")]:
            gap = os.pread(file.fileno(), min(offset - covered, 1 << 22), covered)
            assert not gap.strip(b"\0")
            covered = offset + len(data)


GNU = {
    "gnu": ["--format=gnu"], "pax": ["--format=pax"], "posix times": ["--format=posix", "--pax-option=delete=atime"],
    "xattrs": ["--format=pax", "--xattrs", "--xattrs-include=*"], "old sparse": ["--format=gnu", "--sparse"],
    **{f"sparse {version}": ["--format=pax", "--sparse", f"--sparse-version={version}"]
       for version in ("0.0", "0.1", "1.0")},
}


SPARSE = ["./hole", "./sparse"]


def gnu_tar(where: Path, *arguments: str) -> bytes:
    return subprocess.run(["tar", "-c", *arguments], cwd=where, capture_output=True, check=True).stdout


def with_sparse_files(archive: bytes, tree: Path) -> bytes:
    """`archive`, written without the huge files of holes, and then those in a form that leaves the holes out."""
    end = -(-len(archive.rstrip(b"\0")) // 512) * 512     # of the last member (whose data ends in no zero)
    return archive[:end] + gnu_tar(tree, "--format=pax", "--sparse", *SPARSE)


@pytest.mark.parametrize("options", GNU.values(), ids=GNU)
def test_gnu_tar(tree: Path, options: list[str]) -> None:
    if "--sparse" in options:
        archive = gnu_tar(tree, *options, ".")
    else:
        archive = with_sparse_files(gnu_tar(tree, *options, *(f"--exclude={name}" for name in SPARSE), "."), tree)
    has_xattrs = "--xattrs" in options
    has_ns = any(option in {"--format=pax", "--format=posix"} for option in options)
    check(tree, archive, has_ns=has_ns, has_xattrs=has_xattrs, is_sparse="--sparse" in options)


def test_v7_and_ustar(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"abc")
    (tmp_path / "d/s").symlink_to("f")
    (tmp_path / "d" / ("p" * 90)).mkdir()
    (tmp_path / "d" / ("p" * 90) / ("n" * 99)).write_bytes(b"1")
    assert sorted(read_tree(gnu_tar(tmp_path, "--format=ustar", "d"))) == sorted(
        [b"d", b"d/f", b"d/s", b"d/" + b"p" * 90, b"d/" + b"p" * 90 + b"/" + b"n" * 99])
    found = read_tree(gnu_tar(tmp_path, "--format=v7", "d/f", "d/s", "--no-recursion", "d"))
    assert {path: entry.type.name for path, (entry, _) in found.items()} == {
        b"d": "DIRECTORY", b"d/f": "REGULAR", b"d/s": "SYMLINK"}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tarfile(tree: Path, form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        archive.add(tree, ".", filter=lambda info: None if info.name in SPARSE else info)
    check(tree, with_sparse_files(out.getvalue(), tree), has_ns=False, has_xattrs=False, is_sparse=False)
