"""Whatever the bytes, the reader gives an image whose every accessor works, or FormatError; in bounded memory."""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path  # noqa: TC003

import pytest

from lazyfs.errors import FormatError
from lazyfs.image.erofs import ErofsImage, write_image
from lazyfs.image.model import FileType
from tests.erofskit import CORPUS, DEVICE_SIZES, corpus_trees, mutated, snapshot

IMAGES = sorted(CORPUS.glob("*.img"))
MUTATIONS = 600     # an image; 25,000 in all were run while this was written


def parses(data: bytes) -> bool:
    try:
        image = ErofsImage.parse(data, DEVICE_SIZES)
    except FormatError:
        return False
    use(image)
    return True


def use(image: ErofsImage) -> None:
    """Ask everything: an accepted image has an answer to all."""
    for _, nid in image.walk():
        stat = image.stat(nid)
        image.xattrs(nid)
        if stat.type is FileType.DIRECTORY:
            assert image.parent(nid) is not None
            assert all(image.lookup(nid, name) == child for name, child, _ in image.entries(nid))
        elif stat.type is FileType.SYMLINK:
            assert len(image.readlink(nid)) == stat.size
        elif stat.type is FileType.REGULAR:
            pieces = image.extents(nid, 0, stat.size)
            assert sum(length for _, _, length in pieces) == stat.size
            for device, place, length in pieces:
                assert device < 0 or place + length <= DEVICE_SIZES[device]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_mutations_of_the_corpus(path: Path, request: pytest.FixtureRequest) -> None:
    good = path.read_bytes()
    rng = random.Random(len(good))
    count = int(MUTATIONS * request.config.getoption("--fuzz"))
    accepted = sum(parses(mutated(rng, good)) for _ in range(count))
    assert 0 < accepted < count, "both ways were taken"


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_accepted_images_are_written_again_the_same(path: Path) -> None:
    """What the reader accepts, the writer can express: no state in between."""
    good = path.read_bytes()
    rng = random.Random(99)
    for _ in range(100):
        data = mutated(rng, good)
        try:
            tree = ErofsImage.parse(data, DEVICE_SIZES).to_tree()
        except FormatError:
            continue
        again = ErofsImage.parse(write_image(tree, DEVICE_SIZES), DEVICE_SIZES).to_tree()
        assert snapshot(again) == snapshot(tree)


@pytest.mark.parametrize("name", corpus_trees())
def test_corpus_is_what_the_writer_makes(name: str) -> None:
    """Bytes are the same from version to version. If this must change: python -m tests.erofskit, and say so."""
    assert (CORPUS / f"{name}.img").read_bytes() == write_image(corpus_trees()[name], DEVICE_SIZES)


def test_random_bytes_behind_a_good_superblock() -> None:
    good = (CORPUS / "mixed1.img").read_bytes()
    rng = random.Random(1)
    for _ in range(200):
        data = bytearray(good)
        data[1536:] = rng.randbytes(len(data) - 1536)
        assert not parses(bytes(data))


def test_memory_stays_a_small_multiple() -> None:
    good = (CORPUS / "blocks.img").read_bytes() + bytes(4096 * 64)
    good = good[: 1024 + 36] + (len(good) // 4096).to_bytes(4, "little") + good[1024 + 40 :]
    rng = random.Random(2)
    tracemalloc.start()
    try:
        for _ in range(30):
            parses(mutated(rng, good))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
