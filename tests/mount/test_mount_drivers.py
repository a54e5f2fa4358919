"""Both drivers over one image: what a mounted tree looks like, and that programs run from it."""

# System calls are what is tested here:
# ruff: noqa: PTH101, PTH102, PTH104, PTH106, PTH108, PTH115, PTH116, PTH208, PTH211

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import socket
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from tests.convertkit import Layout, run_convert
from tests.mountkit import Machine, libraries, require_mounting
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.mount
RNG = random.Random(7)
BIG = RNG.randbytes(3_000_000) + bytes(500_000) + b"end"
ACL = bytes.fromhex("0200000001000600ffffffff0200040039300000" "04000000ffffffff10000400ffffffff20000000ffffffff")


def oddities() -> TarBuilder:
    tar = TarBuilder()
    tar.directory("d", mode=0o2751, uid=1000, gid=4_000_000_000, mtime=(1_600_000_000, 5))
    tar.file("d/big", BIG, mode=0o640, mtime=(1_700_000_000, 123_456_789))
    tar.hardlink("d/again", "d/big")
    tar.file("d/empty", b"", mtime=0)
    tar.file(b"d/\xff\xfe", b"odd name")
    tar.file("d/with xattrs", b"x", xattrs={"user.one": b"1", "user.two": b"\0\xff" * 100, "trusted.t": b"t"})
    tar.file("d/suid", b"#!/bin/sh\n", mode=0o6755)
    tar.file("d/acl", b"for one", mode=0o640, xattrs={"system.posix_acl_access": ACL})
    tar.file("d/private", b"root only", mode=0o600)
    tar.symlink("d/link", "big", mtime=77)
    tar.symlink("d/dangling", "x" * 250)
    tar.device("d/null", "c", 1, 3, mode=0o666)
    tar.device("d/disk", "b", 259, 70_000, mode=0o600)
    tar.fifo("d/pipe", mode=0o622)
    tar.directory("many")
    for number in range(2500):
        tar.file(f"many/{number:05d}-{'n' * (number % 200)}", b"%d" % number if number % 3 else b"")
    return tar


@pytest.fixture(scope="module")
def source_tars() -> list[bytes]:
    require_mounting()
    upper = TarBuilder().file("upper", b"from above").whiteout("many/00001-n").build()
    return [oddities().build(), upper]


@pytest.fixture(scope="module")
def image(source_tars: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("image")
    layout = Layout(directory / "in")
    layout.add_image("app", source_tars)
    run_convert(layout.reference("app"), f"oci:{directory}/out:app")
    return f"oci:{directory}/out:app"


@pytest.fixture(scope="module")
def plain(source_tars: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tree, unpacked by GNU tar."""
    directory = tmp_path_factory.mktemp("plain")
    subprocess.run(["tar", "-C", directory, "-xp", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-f", "-"],
                   input=source_tars[0], check=True)
    os.setxattr(directory / "d/acl", "system.posix_acl_access", ACL)
    (directory / "upper").write_bytes(b"from above")
    (directory / "many/00001-n").unlink()
    return directory


@pytest.fixture(scope="module", params=["erofs", "fuse"])
def mounted(request: pytest.FixtureRequest, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    machine = Machine(tmp_path_factory.mktemp(f"machine-{request.param}"))
    try:
        target = machine.target()
        machine.mount(image, target, "--driver", request.param)
        yield target
        machine.umount(target)
        machine.assert_clean()
    finally:
        machine.close()


def describe(path: Path) -> tuple[object, ...]:
    status = path.lstat()
    names = os.listxattr(path, follow_symlinks=False)
    return (
        status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev,
        status.st_size if not stat.S_ISDIR(status.st_mode) else 0,
        status.st_nlink if not stat.S_ISDIR(status.st_mode) else 0,
        os.readlink(path) if stat.S_ISLNK(status.st_mode) else "",
        {name: os.getxattr(path, name, follow_symlinks=False) for name in sorted(names)},
    )


def test_every_name_and_attribute_is_that_of_the_unpacked_tree(mounted: Path, plain: Path):
    found = {path.relative_to(mounted) for path in mounted.rglob("*")}
    assert found == {path.relative_to(plain) for path in plain.rglob("*")}
    for path in found - {Path("upper"), Path("many")}:   # their times are those of unpacking
        assert describe(mounted / path) == describe(plain / path), path


def test_hard_links_are_one_file(mounted: Path):
    assert (mounted / "d/big").stat().st_ino == (mounted / "d/again").stat().st_ino
    assert (mounted / "d/big").stat().st_nlink == 2
    assert (mounted / "d/big").stat().st_dev == mounted.stat().st_dev


def test_bytes_at_any_offset_however_they_are_read(mounted: Path):
    rng = random.Random(3)
    with (mounted / "d/big").open("rb", buffering=0) as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            for _ in range(100):
                offset, size = rng.randrange(len(BIG) + 100), rng.randrange(1, 300_000)
                assert os.pread(file.fileno(), size, offset) == BIG[offset : offset + size]
                assert mapped[offset : offset + size] == BIG[offset : offset + size]
            assert len(mapped) == len(BIG)
        ours, theirs = socket.socketpair()
        with ours, theirs:
            assert os.sendfile(ours.fileno(), file.fileno(), 2_999_000, 2000) == 2000
            assert theirs.recv(4000) == BIG[2_999_000:3_001_000]
        assert file.seek(0, os.SEEK_END) == len(BIG)
    for path in (mounted / "many").iterdir():
        number = int(path.name[:5])
        assert path.read_bytes() == (b"%d" % number if number % 3 else b"")


def test_a_large_directory_is_listed_once_and_can_be_listed_again_from_anywhere(mounted: Path):
    names = os.listdir(mounted / "many")
    assert len(names) == len(set(names)) == 2499
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = ctypes.c_void_p
    libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(mounted / "many")))

    def next_name() -> bytes | None:
        entry = libc.readdir(stream)
        return ctypes.string_at(entry + 19) if entry else None   # struct dirent: d_name

    order, places = [], []
    while True:
        place = libc.telldir(stream)
        name = next_name()
        if name is None:
            break
        places.append(place)
        order.append(name)
    assert sorted(order) == sorted([b".", b"..", *map(os.fsencode, names)])
    for index in (2000, 3, 0, 1234, 2500):
        libc.seekdir(stream, ctypes.c_long(places[index]))
        assert next_name() == order[index]
    libc.closedir(stream)


def test_every_change_is_refused_as_read_only(mounted: Path):
    file, new = mounted / "d/big", mounted / "d/new"
    changes = [
        lambda: os.open(file, os.O_WRONLY), lambda: os.open(file, os.O_RDWR), lambda: os.open(new, os.O_CREAT),
        lambda: os.truncate(file, 0), lambda: os.unlink(file), lambda: os.mkdir(new),
        lambda: os.rmdir(mounted / "many"),
        lambda: os.rename(file, new), lambda: os.link(file, new), lambda: os.symlink("x", new), lambda: os.mknod(new),
        lambda: os.mkfifo(new), lambda: os.chmod(file, 0), lambda: os.chown(file, 1, 1), lambda: os.utime(file),
        lambda: os.setxattr(file, "user.x", b"1"), lambda: os.removexattr(mounted / "d/with xattrs", "user.one"),
    ]
    for change in changes:
        with pytest.raises(OSError) as info:
            change()
        assert info.value.errno == errno.EROFS


def test_wrong_questions_get_the_right_errno(mounted: Path):
    for call, code in [
        (lambda: os.open(mounted / "nothing", os.O_RDONLY), errno.ENOENT),
        (lambda: os.listdir(mounted / "d/big"), errno.ENOTDIR),
        (lambda: os.readlink(mounted / "d/big"), errno.EINVAL),
        (lambda: os.open(mounted / "d/link/x", os.O_RDONLY), errno.ENOTDIR),
        (lambda: os.getxattr(mounted / "d/big", "user.none"), errno.ENODATA),
        (lambda: os.stat(mounted / ("n" * 256)), errno.ENAMETOOLONG),
        (lambda: (mounted / "d").open("rb"), errno.EISDIR),
    ]:
        with pytest.raises(OSError) as info:
            call()
        assert info.value.errno == code


def test_statfs_devices_and_suid_are_as_a_container_needs_them(mounted: Path):
    assert os.statvfs(mounted).f_namemax == 255
    entry = mountapi.mount_at(str(mounted))
    assert entry is not None
    line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {mounted} " in line)
    options = line.split()[5].split(",")
    assert "ro" in options
    assert not {"nosuid", "nodev", "noexec"} & set(options)
    assert (mounted / "d/null").read_bytes() == b""


def open_as(uid: int, directory: Path, name: str) -> int:
    """errno of opening a file of `directory` as another user (0: worked); the way there may be closed to that user."""
    code = (f"import os, sys; os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
            "try: os.open(sys.argv[1], os.O_RDONLY)\nexcept OSError as e: sys.exit(e.errno)")
    return subprocess.run(["/usr/bin/python3", "-c", code, name], check=False, cwd=directory).returncode


def test_permissions_and_acls_hold_for_other_users(mounted: Path):
    directory = mounted / "d"
    assert open_as(12345, directory, "private") == errno.EACCES
    assert open_as(12345, directory, "empty") == 0
    assert open_as(12345, directory, "acl") == 0, "the ACL names this user"
    assert open_as(12346, directory, "acl") == errno.EACCES


def test_overlayfs_takes_it_as_lower_directory(mounted: Path, tmp_path: Path):
    upper, work, merged = tmp_path / "upper", tmp_path / "work", tmp_path / "merged"
    for path in (upper, work, merged):
        path.mkdir()
    mountapi.mount("overlay", str(merged), "overlay", 0, f"lowerdir={mounted},upperdir={upper},workdir={work}")
    try:
        with (merged / "d/big").open("r+b") as file:    # copies up
            file.seek(100)
            file.write(b"changed")
        assert (merged / "d/big").read_bytes() == BIG[:100] + b"changed" + BIG[107:]
        assert (mounted / "d/big").read_bytes() == BIG
        (merged / "many/00002-nn").unlink()
        (merged / "d/with xattrs").rename(merged / "moved")
        assert os.getxattr(merged / "moved", "user.one") == b"1"
        shutil.rmtree(merged / "many")
        assert not (merged / "many").exists()
        assert len(os.listdir(mounted / "many")) == 2499
    finally:
        mountapi.unmount(str(merged))


def test_a_program_runs_from_it_in_a_container(tmp_path: Path):
    require_mounting()
    runc = shutil.which("runc")
    if runc is None:
        pytest.skip("runc is not installed")
    layout = Layout(tmp_path / "in")
    root = TarBuilder()
    names = [shutil.which(name) or "" for name in ("sh", "cat", "id")]
    for path in {Path(name).resolve() for name in names} | {*libraries(*names)}:
        root.file(str(path).lstrip("/"), path.read_bytes(), mode=0o755)
    for name in ("proc", "dev", "sys", "etc"):
        root.directory(name)
    root.file("etc/hello", b"hello from the image\n")
    layout.add_image("app", [root.build()])
    run_convert(layout.reference("app"), f"oci:{tmp_path}/out:app")
    machine = Machine(tmp_path)
    try:
        for driver in ("erofs", "fuse"):
            target = machine.target(driver)
            machine.mount(f"oci:{tmp_path}/out:app", target, "--driver", driver)
            shell, cat = (str(Path(name).resolve()) for name in names[:2])
            command = f"{cat} /etc/hello; echo x > /etc/new; {cat} /etc/new"
            output = run_container(tmp_path / f"bundle-{driver}", target, [shell, "-c", command])
            assert output == "hello from the image\nx\n"
            machine.umount(target)
        machine.assert_clean()
    finally:
        machine.close()


def run_container(bundle: Path, lower: Path, command: list[str]) -> str:
    """Standard output of a command in a container on overlayfs."""
    for name in ("upper", "work", "rootfs"):
        (bundle / name).mkdir(parents=True)
    rootfs = bundle / "rootfs"
    options = f"lowerdir={lower},upperdir={bundle}/upper,workdir={bundle}/work"
    mountapi.mount("overlay", str(rootfs), "overlay", 0, options)
    try:
        subprocess.run(["runc", "spec"], cwd=bundle, check=True)
        spec = (bundle / "config.json").read_text().replace('"terminal": true', '"terminal": false')
        config = json.loads(spec)
        config["process"]["args"] = command
        config["root"]["readonly"] = False
        (bundle / "config.json").write_text(json.dumps(config))
        name = f"lazyfs-test-{os.getpid()}-{lower.name}"
        done = subprocess.run(["runc", "--root", bundle / "state", "run", "--bundle", bundle, name],
                              capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout
    finally:
        mountapi.unmount(str(rootfs))
