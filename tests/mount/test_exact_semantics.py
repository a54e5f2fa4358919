"""
Point by point what an image may hold and a mount must show exactly, with both drivers: names, owners, times, rights.

What every file system must do (read-only errors, listing, overlayfs below a container) is in test_mount_drivers.py;
random combinations are in tests/property/test_images_match_unpacked.py; large things in test_exact_sizes.py.
"""

# ruff: noqa: PTH104, PTH116, PTH118, PTH208 (system calls, and paths of bytes, are what is tested here)

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lazyfs.fs import mountapi
from tests.convertkit import Layout, run_convert
from tests.layerkit import acl
from tests.mountkit import Machine, require_mounting
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

pytestmark = pytest.mark.mount
DRIVERS = ("erofs", "fuse")
LONG = b"n" * 253 + b"\xc3\xbc"                        # 255 bytes
ODD_NAMES = [b"\xff\xfe", LONG, b"new\nline", b" ", b"-rf", b"back\\slash", b".wh", b"a.wh.b", b"..."]
DEEP = b"deep/" + b"/".join([b"d" * 250] * 15 + [b"f" * 200])         # 3,970 bytes
CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 10, 0, 0, 0)     # cap_net_bind_service=ep
TIMES = [-62_135_596_800, -(2**31) - 1, -1, 0, 2**31, 2**32, 253_402_300_799]     # the years 1 to 9999
BIG_XATTRS = {f"user.{number}": bytes([number]) * 65_000 for number in range(3)} | {"trusted.largest": b"l" * 65_535}
SOMEBODY = 12_345                # no user of this machine


def convert(place: Path, tars: Sequence[bytes]) -> str:
    layout = Layout(place / "in")
    layout.add_image("app", tars)
    run_convert(layout.reference("app"), f"oci:{place}/out:app")
    return f"oci:{place}/out:app"


# --- one image of many things -----------------------------------------------------------------------------------------


def build_things() -> list[bytes]:
    first = TarBuilder()
    first.directory("./", mode=0o2711, uid=5, gid=6, mtime=(1_234_567_890, 987_654_321), xattrs={"user.root": b"yes"})
    first.directory("names").directory("times").directory("owners").directory("xattrs")
    for odd in ODD_NAMES:
        first.file(b"names/" + odd, odd)
    first.file(DEEP, b"deep")
    for seconds in TIMES:
        first.file(f"times/{seconds}", mtime=(seconds, 999_999_999))
        first.symlink(f"times/link{seconds}", "x", mtime=(seconds, 1))
    first.file("owners/f", uid=2**32 - 2, gid=2**32 - 2).directory("owners/d", uid=2**32 - 2, gid=2**31)
    first.symlink("owners/l", "f", uid=2**31, gid=2**32 - 2)
    first.file("xattrs/large", b"x", xattrs=BIG_XATTRS)
    first.file("xattrs/many", b"x", xattrs={f"user.{number:04}" + "n" * 200: b"%d" % number for number in range(250)})
    first.file("xattrs/names", b"x", xattrs={"user." + "u" * 250: b"1", "security.x": b"", "trusted.\xff": b"2"})
    # user.* on what is no file and no directory: the kernel knows no such thing, and containerd drops it with a warning
    first.symlink("xattrs/link", "names", xattrs={"user.a": b"1", "trusted.a": b"2"})
    first.fifo("xattrs/pipe", xattrs={"user.a": b"1", "trusted.a": b"2"})
    first.device("xattrs/zero", "c", 1, 5, mode=0o666, xattrs={"user.a": b"1", "trusted.a": b"2"})
    first.symlink("xattrs/mode", "names", mode=0o600)       # a symlink's mode is always 0777
    first.file("xattrs/acl", b"x", mode=0o640, xattrs={"system.posix_acl_access": acl(0o640, SOMEBODY)})
    first.directory("xattrs/d", mode=0o750, xattrs={"system.posix_acl_default": acl(0o750, SOMEBODY)})
    first.file("xattrs/overlay", b"x", xattrs={"trusted.overlay.opaque": b"y", "user.overlay.opaque": b"y"})
    for name, program in (("setuid", "/usr/bin/id"), ("capable", "/usr/bin/grep")):
        data = Path(program).resolve().read_bytes()
        if name == "setuid":
            first.file(name, data, mode=0o4755, uid=SOMEBODY)
        else:
            first.file(name, data, mode=0o755, xattrs={"security.capability": CAPABILITY})
    first.file("linked", b"three names", mode=0o640, mtime=77).file("other", b"other")
    second = TarBuilder().hardlink("second", "linked").hardlink("a/b/third", "second").hardlink("gone", "other")
    third = TarBuilder().whiteout("linked").whiteout("other").file("gone", b"replaced")
    fourth = TarBuilder().hardlink("fourth", "a/b/third")
    return [tar.build() for tar in (first, second, third, fourth)]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_mounting()
    return convert(tmp_path_factory.mktemp("things"), build_things())


@pytest.fixture(scope="module", params=DRIVERS)
def top(request: pytest.FixtureRequest, image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    machine = Machine(tmp_path_factory.mktemp(f"machine-{request.param}"))
    try:
        machine.mount(image, machine.target(), "--driver", request.param)
        yield machine.target()
        machine.umount(machine.target())
        machine.assert_clean()
    finally:
        machine.close()


def xattrs_of(path: Path) -> dict[str, bytes]:
    names = os.listxattr(path, follow_symlinks=False)
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}


def test_the_root_directory_is_as_its_entry_says(top: Path) -> None:
    found = top.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o2711, 5, 6)
    assert found.st_mtime_ns == 1_234_567_890_987_654_321
    assert xattrs_of(top) == {"user.root": b"yes"}


def test_names_of_any_bytes_up_to_255(top: Path) -> None:
    names = os.fsencode(top / "names")
    assert sorted(os.listdir(names)) == sorted(ODD_NAMES)
    for name in ODD_NAMES:
        with open(os.path.join(names, name), "rb") as file:     # noqa: PTH123
            assert file.read() == name
    # Its path from the root directory is longer than PATH_MAX allows, so from the mount.
    directory = os.open(top, os.O_PATH)
    try:
        descriptor = os.open(DEEP, os.O_RDONLY, dir_fd=directory)
        assert os.read(descriptor, 10) == b"deep"
        os.close(descriptor)
    finally:
        os.close(directory)


@pytest.mark.parametrize("seconds", TIMES)
def test_times_of_ten_thousand_years_to_the_nanosecond(top: Path, seconds: int) -> None:
    assert os.stat(top / f"times/{seconds}").st_mtime_ns == seconds * 10**9 + 999_999_999
    assert os.lstat(top / f"times/link{seconds}").st_mtime_ns == seconds * 10**9 + 1


def test_owners_up_to_the_largest(top: Path) -> None:
    found = {name: os.lstat(top / "owners" / name) for name in ("f", "d", "l")}
    assert {name: (one.st_uid, one.st_gid) for name, one in found.items()} == {
        "f": (2**32 - 2, 2**32 - 2), "d": (2**32 - 2, 2**31), "l": (2**31, 2**32 - 2)}


def test_xattrs_near_the_limits(top: Path) -> None:
    assert xattrs_of(top / "xattrs/large") == BIG_XATTRS
    many = xattrs_of(top / "xattrs/many")
    assert len(many) == 250
    assert many["user.0123" + "n" * 200] == b"123"
    assert xattrs_of(top / "xattrs/names") == {"user." + "u" * 250: b"1", "security.x": b"", "trusted.\xff": b"2"}


def test_what_cannot_be_is_left_out(top: Path) -> None:
    """As unpacking by containerd leaves it out."""
    for name in ("link", "pipe", "zero"):
        assert xattrs_of(top / "xattrs" / name) == {"trusted.a": b"2"}, name
    assert stat.S_IMODE(os.lstat(top / "xattrs/mode").st_mode) == 0o777
    assert xattrs_of(top / "xattrs/overlay") == {}


def test_acls_as_getfacl_shows_them(top: Path) -> None:
    words = ["getfacl", "--numeric", "--omit-header", "--absolute-names", str(top / "xattrs/acl")]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert text.split() == [
        "user::rw-", f"user:{SOMEBODY}:r--", "group::r-x", "#effective:r--", "mask::r--", "other::---"]
    words[-1] = str(top / "xattrs/d")
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert f"default:user:{SOMEBODY}:r--" in text


def test_setuid_capabilities_and_devices_work(top: Path) -> None:
    program = subprocess.run([top / "setuid", "-u"], capture_output=True, text=True, check=True)
    assert program.stdout == f"{SOMEBODY}\n"
    # The way to the mount is closed to others: the child starts in it, then becomes somebody.
    words = ["./capable", "CapEff", "/proc/self/status"]
    found = subprocess.run(words, cwd=top, user=SOMEBODY, group=SOMEBODY, extra_groups=[], capture_output=True,
                           text=True, check=True).stdout
    assert int(found.split()[1], 16) == 1 << 10
    with (top / "xattrs/zero").open("rb") as device:
        assert device.read(10) == bytes(10)


def test_hard_links_across_layers(top: Path) -> None:
    names = ["second", "a/b/third", "fourth"]
    found = [os.stat(top / name) for name in names]
    assert len({one.st_ino for one in found}) == 1
    assert {(one.st_nlink, one.st_mtime_ns, one.st_mode) for one in found} == {(3, 77 * 10**9, 0o100640)}
    assert {(top / name).read_bytes() for name in names} == {b"three names"}
    assert not (top / "linked").exists()
    assert (os.stat(top / "gone").st_nlink, (top / "gone").read_bytes()) == (1, b"replaced")
    assert not (top / "other").exists()


def test_rarer_changes_are_refused_as_read_only(top: Path) -> None:
    descriptor = os.open(top, os.O_RDONLY)
    try:
        changes: list[Callable[[], object]] = [
            lambda: os.open(top, os.O_TMPFILE | os.O_RDWR),
            lambda: os.open(top / "second", os.O_RDONLY | os.O_TRUNC),
            lambda: os.rename(top / "second", top / "setuid"),
            lambda: os.setxattr(top / "second", "system.posix_acl_access", acl(0o640)),
            lambda: os.setxattr(top / "xattrs/link", "trusted.a", b"3", follow_symlinks=False),
            lambda: os.utime("second", ns=(1, 1), dir_fd=descriptor),
            lambda: os.lchown(top / "xattrs/link", 1, 1),
            lambda: os.open("new", os.O_CREAT | os.O_EXCL | os.O_WRONLY, dir_fd=descriptor),
        ]
        for change in changes:
            with pytest.raises(OSError) as info:
                change()
            assert info.value.errno == errno.EROFS
    finally:
        os.close(descriptor)


def test_copy_up_takes_everything_along(top: Path, tmp_path: Path) -> None:
    upper, work, merged = (tmp_path / name for name in ("upper", "work", "merged"))
    for path in (upper, work, merged):
        path.mkdir()
    mountapi.mount("overlay", str(merged), "overlay", 0, f"lowerdir={top},upperdir={upper},workdir={work}")
    try:
        for name in ("capable", "xattrs/names", "xattrs/acl", "second"):
            want, attributes = os.stat(top / name), xattrs_of(top / name)
            (merged / name).touch()      # a new time: copies up
            os.utime(merged / name, ns=(want.st_mtime_ns, want.st_mtime_ns))
            found = os.stat(upper / name)
            assert (found.st_mode, found.st_uid, found.st_mtime_ns) == (want.st_mode, want.st_uid, want.st_mtime_ns)
            assert xattrs_of(merged / name) == attributes
            assert (upper / name).read_bytes() == (top / name).read_bytes()
        (merged / "second").rename(merged / "names" / "moved")
        (merged / "fourth").unlink()
        assert (merged / "names/moved").read_bytes() == b"three names"
        assert not (merged / "fourth").exists()
        assert not (merged / "second").exists()
        assert stat.S_ISCHR(os.lstat(upper / "fourth").st_mode), "a whiteout lies above"
        assert (top / "fourth").exists()
        (merged / "fourth").write_bytes(b"new")
        assert (merged / "fourth").read_bytes() == b"new"
    finally:
        mountapi.unmount(str(merged))
