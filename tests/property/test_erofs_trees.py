"""Any tree, written and read back, is the same tree; and every question to the image has the model's answer."""

from __future__ import annotations

import random  # noqa: TC003

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import FileType, Inode
from tests.erofskit import DEVICE_SIZES, extents, paths, random_tree, snapshot


@settings(deadline=None, max_examples=100)
@given(rng=st.randoms(use_true_random=False), entries=st.integers(0, 60))
def test_tree_comes_back(rng: random.Random, entries: int) -> None:
    root = random_tree(rng, entries)
    image = ErofsImage.parse(write_image(root, DEVICE_SIZES), DEVICE_SIZES)
    tree = image.to_tree()
    assert snapshot(tree) == snapshot(root)
    assert image.inode_count == len({id(node) for _, node in paths(root)})


@settings(deadline=None, max_examples=40)
@given(rng=st.randoms(use_true_random=False), entries=st.integers(0, 60))
def test_accessors_agree_with_the_model(rng: random.Random, entries: int) -> None:
    root = random_tree(rng, entries)
    image = ErofsImage.parse(write_image(root, DEVICE_SIZES), DEVICE_SIZES)
    nids = dict(image.walk())
    model = dict(paths(root))
    assert nids.keys() == model.keys()
    for path, node in model.items():
        nid = nids[path]
        check_stat(image, nid, node)
        if node.type is FileType.DIRECTORY:
            found = image.entries(nid)
            assert [(name, kind) for name, _, kind in found] == [
                (name, node.children[name].type) for name in sorted(node.children)
            ]
            assert all(image.lookup(nid, name) == child for name, child, _ in found)
            assert image.lookup(nid, b"zzzz") is None
        elif node.type is FileType.SYMLINK:
            assert image.readlink(nid) == node.target
        elif node.type is FileType.REGULAR:
            pieces = [piece for piece in image.extents(nid, 0, node.size) if piece[0] >= 0]
            assert pieces == [(device, place, length) for device, _, place, length in extents(node)]


def check_stat(image: ErofsImage, nid: int, node: Inode) -> None:
    stat, attributes = image.stat(nid), node.attributes
    assert (stat.nid, stat.type, stat.mode, stat.uid, stat.gid, stat.mtime_s, stat.mtime_ns, stat.rdev) == (
        nid, node.type, attributes.mode, attributes.uid, attributes.gid, attributes.mtime_s, attributes.mtime_ns,
        node.rdev,
    )  # fmt: skip
    assert stat.link_count == node.link_count
    assert image.xattrs(nid) == attributes.xattrs
    if node.type is FileType.REGULAR:
        assert stat.size == node.size
