"""Any valid layer metadata comes back as it went in; any tail, any bootstrap with it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyfs import limits
from lazyfs.image.bootstrap import compress_layer, decompress_layer, pack_bootstrap, parse_bootstrap
from lazyfs.image.entries import pack_entries, parse_entries
from lazyfs.image.model import Attributes, DataMap, EntryKind, FileType, LayerEntry
from tests.formatkit import make_bootstrap

names = st.binary(min_size=1, max_size=255).map(lambda name: name.translate(None, b"/\0") or b"n").filter(
    lambda name: name not in (b".", b"..")
)
paths = st.lists(names, min_size=1, max_size=8).map(b"/".join)
ids = st.integers(0, 0xFFFF_FFFF)
xattrs = st.dictionaries(st.binary(min_size=1, max_size=255).map(lambda name: name.translate(None, b"\0") or b"x"),
                         st.binary(max_size=300), max_size=4).map(lambda found: tuple(sorted(found.items())))
attributes = st.builds(
    Attributes, st.integers(0, 0o7777), ids, ids, st.integers(-(1 << 63),
    (1 << 63) - 1), st.integers(0, 999_999_999), xattrs
)


@st.composite
def files(draw: st.DrawFn) -> LayerEntry:
    shift = draw(st.integers(12, 43))
    size = draw(st.integers(0, limits.FILE_BYTES_MAX))
    units = -(-size >> shift)
    runs, unit = [], 0
    for _ in range(draw(st.integers(0, 3))):
        first = unit + draw(st.integers(0, 3))
        count = draw(st.integers(1, 3))
        if first + count > units or (count << shift) > 1 << 40:
            break
        runs.append((first, count, draw(st.integers(0, 1 << 31))))
        unit = first + count
    return LayerEntry(draw(paths), attributes=draw(attributes), size=size, data=DataMap(shift, tuple(runs)))


entries = st.one_of(
    files(),
    st.builds(LayerEntry, st.one_of(paths, st.just(b"")), type=st.just(FileType.DIRECTORY), attributes=attributes),
    st.builds(LayerEntry, paths, type=st.sampled_from([FileType.FIFO, FileType.SOCKET]), attributes=attributes),
    st.builds(LayerEntry, paths, type=st.sampled_from([FileType.CHARACTER, FileType.BLOCK]), attributes=attributes,
              rdev=st.tuples(st.integers(0, 4095), st.integers(0, (1 << 20) - 1))),
    st.builds(LayerEntry, paths, type=st.just(FileType.SYMLINK), attributes=attributes,
              target=st.binary(min_size=1, max_size=300).map(lambda text: text.replace(b"\0", b"/"))),
    st.builds(LayerEntry, paths, kind=st.just(EntryKind.HARDLINK), target=paths),
    st.builds(LayerEntry, paths, kind=st.just(EntryKind.WHITEOUT)),
    st.builds(LayerEntry, st.one_of(paths, st.just(b"")), kind=st.just(EntryKind.OPAQUE)),
)


@given(st.lists(entries, max_size=12))
@settings(max_examples=300, deadline=None)
def test_entries_come_back(given_entries: list[LayerEntry]) -> None:
    packed = pack_entries(given_entries)
    assert parse_entries(packed) == given_entries
    assert pack_entries(given_entries) == packed


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([b"\0", b"x", b"abc\n"])), max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_bootstraps_come_back(shapes: list[tuple[int, bytes]], data: st.DataObject) -> None:
    devices = [(fill * 4096)[: blocks * 4096].ljust(blocks * 4096, b"\0") for blocks, fill in shapes]
    every = [(block, device, 1) for device, (blocks, _) in enumerate(shapes) for block in range(blocks)]
    hot = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    bootstrap = make_bootstrap(devices, hot=hot)
    tar = pack_bootstrap(bootstrap)
    parsed = parse_bootstrap(decompress_layer(compress_layer(tar), len(tar)))
    assert parsed.blobs == bootstrap.blobs
    assert [device.digest for device in parsed.devices] == [device.digest for device in bootstrap.devices]
    assert pack_bootstrap(parsed) == tar
