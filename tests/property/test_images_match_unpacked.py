"""
Differential test of the whole way: random layer stacks, converted, mounted, against what others make of them.

Layers -> OCI layout -> `convert` -> mounts of both drivers, compared, name by name and byte by byte, with
(a) the layers unpacked one after another into one directory, and into an overlayfs stack, by plain system calls
    (tests.unpackkit, which shares no code with us), and (b) what `umoci unpack` makes of the same archives.
What no runtime can apply (a hard link to nothing, a loop of symlinks on the way) must be refused by us, too.

LAZYFS_TEST_EXAMPLES=500 tries so many stacks, other ones each time; the default is the same 40 in every run.
LAZYFS_TEST_SHRINK=1 looks for a smaller stack that fails as well.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from converter.encode import Encoding
from lazyfs.errors import FormatError
from lazyfs.image.codec import Codec
from lazyfs.node.launch import mount_image
from lazyfs.node.order import MountOrder
from lazyfs.node.unmounting import unmount_target
from tests.convertkit import Layout, run_convert
from tests.layerkit import Node, Stack, archive, snapshot, stacks
from tests.mountkit import Machine, require_mounting
from tests.tarbuilder import TarBuilder
from tests.unpackkit import (
    ACCESS_ACL,
    BELOW_FILE,
    DEFAULT_ACL,
    Item,
    State,
    mounted,
    unpack_plain,
    unpack_umoci,
    unpacked_overlay,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

EXAMPLES = int(os.environ.get("LAZYFS_TEST_EXAMPLES", "0"))
ENCODINGS = {
    "lz4": Encoding(Codec.LZ4, 1, 65_536), "zstd": Encoding(Codec.ZSTD, 1, 65_536),
    "none": Encoding(Codec.NONE, 0, 65_536),
}
# Shrinking mounts thousands of images: only when asked for (it ends after five minutes).
PHASES = [Phase.generate, *([Phase.shrink] if os.environ.get("LAZYFS_TEST_SHRINK") else [])]
IMPLIED_TIME_NS = 0              # of parents no layer lists (docs/semantics.md); unpackers leave the time of unpacking

pytestmark = pytest.mark.mount


def test_random_stacks_equal_what_others_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_mounting()
    machine = Machine(tmp_path)
    monkeypatch.setenv("LAZYFS_RUN_DIR", str(machine.run_dir))     # for mount_image in this process
    bench = Bench(machine)

    @settings(max_examples=EXAMPLES or 40, phases=PHASES, derandomize=not EXAMPLES, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(stacks())
    def check(stack: Stack) -> None:
        bench.check(stack)

    # tmpfs holds all times, large xattrs and ACLs, and nothing there needs a sync.
    try:
        with mounted("tmpfs", bench.top, "size=2g"):
            machine.mount(bench.anchor, machine.target("anchor"))     # its worker makes all the mounts
            check()
            machine.umount(machine.target("anchor"))
        machine.assert_clean()
    finally:
        machine.close()
    print(bench.counts)
    assert bench.counts["umoci"] > bench.counts["stacks"] // 3, bench.counts     # most examples must be usable
    assert bench.counts["names"] > 3 * bench.counts["stacks"], bench.counts


class Bench:
    """Places that last for all examples."""

    def __init__(self, machine: Machine) -> None:
        self.top = machine.target("t")
        self.cache = machine.cache
        layout = Layout(machine.directory / "anchor-in")
        layout.add_image("app", [TarBuilder().file("a", b"x").build()])
        self.anchor = f"oci:{machine.directory}/anchor-out:app"
        run_convert(layout.reference("app"), self.anchor)
        self.counts = {"stacks": 0, "names": 0, "umoci": 0, "overlay link groups": 0, "refused": 0}

    def check(self, stack: Stack) -> None:
        place = self.top / "example"
        place.mkdir()
        try:
            self._check(place, stack)
        finally:
            shutil.rmtree(place)

    def _check(self, place: Path, stack: Stack) -> None:
        plain = place / "plain"
        state, refused = unpack_plain(plain, stack.layers)
        self._check_refused(place, stack, refused)
        layers = [[item for number, item in enumerate(items) if number not in bad]
                  for items, bad in zip(stack.layers, refused, strict=True)]
        rng = random.Random(len(repr(stack)))
        want = snapshot(plain, rng)
        archives = [archive(items, style) for items, style in zip(layers, stack.styles, strict=True)]
        layout = self._write(place / "in", archives, stack.compressions)
        # umoci 0.4.7 knows neither zstd nor GNU tar's type S, and applies a whiteout where it stands: after entries
        # that a hidden symlink has led elsewhere. layer.md wants it to stand before them.
        layout.add_image("umoci", [archive(sorted(items, key=lambda item: not item.hides)) for items in layers])
        reference = f"oci:{place}/out:app"
        run_convert(layout.reference("app"), reference, encoding=ENCODINGS[stack.codec])
        for driver in ("erofs", "fuse"):
            with quick_mount(reference, place / driver, cache=self.cache, driver=driver) as top:
                found = snapshot(top, rng)
            compare(f"driver {driver}", found, {path: _as_promised(path, node, state) for path, node in want.items()})
        # The references among themselves: a mistake in unpackkit must not hide one in the product.
        without = {path: _without_time(node) if path in state.implied_paths else node for path, node in want.items()}
        with unpacked_overlay(place / "overlay", layers) as top:
            self._compare_overlay(layers, snapshot(top, rng), without, state)
        if not state.beyond_umoci:
            found = snapshot(unpack_umoci(layout.path, "umoci", place / "umoci"), rng)
            self._compare_umoci(layers, found, without, state)
        self.counts["stacks"] += 1
        self.counts["names"] += len(want)

    def _compare_overlay(
        self, layers: Sequence[Sequence[Item]], found: dict[bytes, Node], want: dict[bytes, Node], state: State
    ) -> None:
        found = {path: _without_time(node) if path in state.implied_paths else node for path, node in found.items()}
        if any(item.kind == "link" for items in layers[1:] for item in items):
            # Linking to a file of a lower layer copies it up, and so takes it from its other names: a limit of
            # overlayfs (Documentation/filesystems/overlayfs.rst, "hard links"), not what the layers say.
            found, want = _without_groups(found), _without_groups(want)
        else:
            # A name that an upper layer hides still counts in the lower file's st_nlink.
            found, want = _without_counts(found), _without_counts(want)
            self.counts["overlay link groups"] += 1
        compare("overlayfs", found, want)

    def _compare_umoci(
        self, layers: Sequence[Sequence[Item]], found: dict[bytes, Node], want: dict[bytes, Node], state: State
    ) -> None:
        # In a setgid directory mkdir(2) inherits the group and the bit, for the parents that umoci makes, too.
        for path in state.implied_paths:
            found[path] = replace(found[path], mode=want[path].mode, gid=want[path].gid)
        # umoci keeps a directory's time over what it puts there by the directory's own name only: not over
        # whiteouts, not over entries that come through a symlink, and never the root's.
        found = {path: _without_time(node) if node.kind == stat.S_IFDIR else node for path, node in found.items()}
        want = {path: _without_time(node) if node.kind == stat.S_IFDIR else node for path, node in want.items()}
        if any(name == DEFAULT_ACL for items in layers for item in items for name, _ in item.xattrs):
            # What umoci makes in a directory with a default ACL inherits it, whatever the archive says.
            found, want = _without_acls(found), _without_acls(want)
        # Go's tar.Header.Xattrs, which umoci reads, lacks those with an empty value; containerd takes PAXRecords.
        compare("umoci", _without_empty_xattrs(found), _without_empty_xattrs(want))
        self.counts["umoci"] += 1

    def _check_refused(self, place: Path, stack: Stack, refused: Sequence[dict[int, str]]) -> None:
        """The first entry that nobody can apply, after all that come before it."""
        index = next((index for index, bad in enumerate(refused) if bad), None)
        if index is None:
            return
        first = min(refused[index])
        items = stack.layers[index]
        # A layer's whiteouts count from its start, wherever they stand.
        part = [*items[: first + 1], *(item for item in items[first + 1 :] if item.hides)]
        _, again = unpack_plain(place / "refused", [*stack.layers[:index], part])
        if again[-1].get(first) in {None, BELOW_FILE}:
            return      # a file becomes a parent within one layer: containerd and umoci fail, the later entry wins here
        layout = self._write(place / "refused-in", [archive(each) for each in [*stack.layers[:index], part]])
        with pytest.raises(FormatError):
            run_convert(layout.reference("app"), f"oci:{place}/refused-out:app")
        self.counts["refused"] += 1

    def _write(self, path: Path, archives: Sequence[bytes], compressions: Sequence[str] = ()) -> Layout:
        layout = Layout(path)
        kinds = compressions or ["plain"] * len(archives)
        layers = [layout.layer(data, kind) for data, kind in zip(archives, kinds, strict=True)]
        layout.add_image("app", archives, layers=layers)
        return layout


@contextlib.contextmanager
def quick_mount(reference: str, target: Path, *, cache: Path, driver: str) -> Iterator[Path]:
    """As `lazyfs mount` and `umount`, without the time that two processes take to start."""
    target.mkdir()
    mount_image(MountOrder(image=reference, target=str(target), driver=driver), str(cache)).close()
    try:
        yield target
    finally:
        unmount_target(str(target), lazy=False, force=False)


# --- comparing ----------------------------------------------------------------------------------------------------


def compare(who: str, found: dict[bytes, Node], want: dict[bytes, Node]) -> None:
    """Say the first difference in full."""
    lost, more = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
    assert not lost, f"{who} lacks {lost}"
    assert not more, f"{who} has also {more}"
    for path in sorted(want):
        for name in Node.__slots__:
            one, other = getattr(found[path], name), getattr(want[path], name)
            assert one == other, f"{who}: {name} of {path!r} is {one!r}, unpacked it is {other!r}"


def _as_promised(path: bytes, node: Node, state: State) -> Node:
    return replace(node, mtime_ns=IMPLIED_TIME_NS) if path in state.implied_paths else node


def _without_time(node: Node) -> Node:
    return replace(node, mtime_ns=0)


def _without_counts(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    return {path: replace(node, link_count=0) for path, node in nodes.items()}


def _without_groups(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    return {path: replace(node, group=b"", link_count=0) for path, node in nodes.items()}


def _without_empty_xattrs(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    return {path: replace(node, xattrs=tuple(pair for pair in node.xattrs if pair[1])) for path, node in nodes.items()}


def _without_acls(nodes: dict[bytes, Node]) -> dict[bytes, Node]:
    acls = {ACCESS_ACL, DEFAULT_ACL}
    return {
        path: replace(node, mode=0, xattrs=tuple(pair for pair in node.xattrs if pair[0] not in acls))
        for path, node in nodes.items()
    }
