"""Parsing of mountinfo, the errors of mount calls, numbers of inodes."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import FormatError, HostError, LazyfsError, TargetError
from lazyfs.fs import drivers, inodes, mountapi

LINE = rb"36 35 98:0 /mnt1 /mnt\0402\011x\134y rw,noatime master:1 shared:7 - ext3 /dev/root\040x rw,errors=continue"


def test_a_line_with_optional_fields_and_escapes():
    (entry,) = mountapi.parse_mountinfo(LINE + b"\n")
    assert entry == mountapi.MountEntry(36, 35, "98:0", "/mnt1", "/mnt 2\tx\\y", "ext3", "/dev/root x",
                                        "rw,errors=continue")


def test_without_optional_fields_and_with_bytes_that_are_no_text():
    (entry,) = mountapi.parse_mountinfo(b"1 0 0:1 / /\xff - - proc proc rw".replace(b" - - ", b" rw - "))
    assert os.fsencode(entry.target) == b"/\xff"


@pytest.mark.parametrize("line", [b"", b"x", b"1 2 3", b"a 0 0:1 / / rw - proc proc rw", LINE.partition(b" - ")[0],
                                  b"1 0 0:1 / / rw - proc"])
def test_malformed_lines_are_format_errors(line: bytes):
    if not line:
        assert mountapi.parse_mountinfo(line) == []
        return
    with pytest.raises(FormatError):
        mountapi.parse_mountinfo(line)


@given(st.binary(max_size=300))
def test_any_bytes_give_entries_or_the_one_error(data: bytes):
    with contextlib.suppress(FormatError):
        mountapi.parse_mountinfo(data)


def test_the_topmost_mount_of_a_target_counts():
    entries = mountapi.parse_mountinfo(b"1 0 0:1 / /a rw - proc p rw\n2 1 0:2 / /a rw - tmpfs t rw\n")
    found = mountapi.mount_at("/a", entries)
    assert found is not None
    assert found.fs_type == "tmpfs"
    assert mountapi.mount_at("/b", entries) is None


def test_this_machines_own_mounts_parse():
    root = mountapi.mount_at("/")
    assert root is not None
    assert root.device.count(":") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to get as far as the kernel's own refusals")
def test_refusals_of_the_kernel_are_lazyfs_errors(tmp_path):
    with pytest.raises(TargetError):
        mountapi.mount("none", str(tmp_path / "missing"), "tmpfs", 0)
    with pytest.raises(HostError) as info:
        mountapi.mount_by_context("no-such-fs", "x", str(tmp_path), [])
    assert "no-such-fs" in str(info.value)
    with pytest.raises(TargetError):
        mountapi.unmount(str(tmp_path))
    garbage = tmp_path / "garbage"
    garbage.write_bytes(bytes(8192))
    with pytest.raises(LazyfsError) as failed:
        mountapi.mount_by_context("erofs", str(garbage), str(tmp_path), [])
    assert str(tmp_path) in str(failed.value)
    with pytest.raises(HostError, match="too long"):
        mountapi.mount_by_context("erofs", "/" + "x" * 300, str(tmp_path), [])


def test_drivers_are_chosen_by_kernel(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mountapi, "kernel_knows", lambda fs_type: True)
    monkeypatch.setattr(mountapi, "kernel_version", lambda: (6, 12))
    assert drivers.choose_driver("auto") is drivers.Driver.EROFS
    assert drivers.choose_driver("fuse") is drivers.Driver.FUSE
    monkeypatch.setattr(mountapi, "kernel_version", lambda: (6, 11))
    assert drivers.choose_driver("auto") is drivers.Driver.FUSE
    with pytest.raises(HostError, match=r"older than 6\.12"):
        drivers.choose_driver("erofs")
    monkeypatch.setattr(mountapi, "kernel_version", lambda: (7, 0))
    monkeypatch.setattr(mountapi, "kernel_knows", lambda fs_type: False)
    assert drivers.choose_driver("auto") is drivers.Driver.FUSE
    with pytest.raises(HostError, match="no EROFS"):
        drivers.choose_driver("erofs")


@given(st.integers(1, inodes.SLOT_MAX), st.integers(0, inodes.NID_MASK))
def test_inode_numbers_come_apart_again(slot: int, nid: int):
    number = inodes.tree_inode(slot, nid)
    assert inodes.split(number) == (slot, nid)
    assert 0 < number < 1 << 63


def test_node_numbers_beyond_the_encoding_are_refused():
    with pytest.raises(FormatError):
        inodes.tree_inode(1, inodes.NID_MASK + 1)
    assert inodes.split(inodes.device_inode(7))[0] == 0
