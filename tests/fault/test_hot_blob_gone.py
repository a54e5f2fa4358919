"""A hot blob that is gone from its registry: the image is read all the same, out of the layers' own blobs."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import NotFoundError
from lazyfs.fetch.hotcopies import HotCopies
from lazyfs.image.codec import Codec
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry import RegistryOptions, open_source
from lazyfs.registry.streams import read_exactly
from tests.convertkit import OPTIONS, Layout, Lazy, run_convert
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

    from tests.mountkit import Machine

CHUNK = OPTIONS.encoding.chunk_size
HOT = b"data/late 1000000-\ndata/early\nbin/new\ndata/early-again 0-10\n"


def contents() -> dict[str, bytes]:
    rng = random.Random(7)
    early = rng.randbytes(5 * CHUNK)
    return {"data/early": early, "data/late": rng.randbytes(20 * CHUNK), "data/early-again": early,
            "data/text": b"a line\n" * 100_000, "bin/new": rng.randbytes(3 * CHUNK + 5)}


def make_image(path: Path) -> str:
    """Two layers with copies in the hot blob, one below them without any."""
    files = contents()
    other = TarBuilder().file("etc/other", random.Random(8).randbytes(2 * CHUNK)).build()
    base = TarBuilder()
    for name in ("data/early", "data/text", "data/late"):
        base.file(name, files[name])
    top = TarBuilder().file("data/early-again", files["data/early-again"]).file("bin/new", files["bin/new"]).build()
    layout = Layout(path)
    layout.add_image("app", [other, base.build(), top])
    return layout.reference("app")


def read_through(source: HotCopies, lazy: Lazy, first: int, last: int, places: list[tuple[int, int]]) -> bytes:
    start, size = places[first][0], places[last][0] + places[last][1] - places[first][0]
    hot = next(blob for blob in lazy.bootstrap.blobs if blob.hot)
    with source.read_range(hot.digest, start, size, time.monotonic() + 10) as stream:
        data = read_exactly(stream, size)
        assert stream.read(1) == b""
    return data


@pytest.mark.parametrize("codec", [Codec.LZ4, Codec.NONE])
def test_every_run_of_copies_is_found_where_it_came_from(tmp_path: Path, codec: Codec) -> None:
    text = f"oci:{tmp_path}/out:lazy"
    run_convert(make_image(tmp_path / "in"), text, prefetch=parse_prefetch(HOT),
                encoding=replace(OPTIONS.encoding, codec=codec, level=1 if codec is Codec.LZ4 else 0))
    with contextlib.closing(Lazy(text)) as lazy, contextlib.closing(open_source(text, RegistryOptions())) as inner:
        index = next(number for number, blob in enumerate(lazy.bootstrap.blobs) if blob.hot)
        whole = lazy.blob(index)
        rows = [row for table in lazy.tables for row in table.rows if row["blob_index"] == index and row["stored_size"]]
        places = sorted({(int(row["blob_offset"]), int(row["stored_size"])) for row in rows})
        assert len(places) > 8
        devices = [(device.digest, device.table) for device in lazy.bootstrap.devices]
        blob = tmp_path / "out/blobs/sha256" / lazy.bootstrap.blobs[index].digest.hex
        blob.rename(tmp_path / "away")
        source = HotCopies(inner, lazy.bootstrap.blobs, devices)
        rng = random.Random(1)
        for first, last in [(0, len(places) - 1), *(sorted(rng.choices(range(len(places)), k=2)) for _ in range(20))]:
            start, end = places[first][0], places[last][0] + places[last][1]
            assert read_through(source, lazy, first, last, places) == whole[start:end]
        with pytest.raises(NotFoundError):    # no chunk begins there
            source.read_range(lazy.bootstrap.blobs[index].digest, 1, 10, time.monotonic() + 10)
        (tmp_path / "away").rename(blob)
        with source.read_range(lazy.bootstrap.blobs[index].digest, 1, 10, time.monotonic() + 10) as stream:
            assert read_exactly(stream, 10) == whole[1:11]    # it has come back


def test_a_layers_blob_that_is_gone_too_is_an_error(tmp_path: Path) -> None:
    text = f"oci:{tmp_path}/out:lazy"
    run_convert(make_image(tmp_path / "in"), text, prefetch=parse_prefetch(HOT))
    with contextlib.closing(Lazy(text)) as lazy, contextlib.closing(open_source(text, RegistryOptions())) as inner:
        devices = [(device.digest, device.table) for device in lazy.bootstrap.devices]
        hot = next(blob for blob in lazy.bootstrap.blobs if blob.hot)
        for blob in lazy.bootstrap.blobs:
            (tmp_path / "out/blobs/sha256" / blob.digest.hex).unlink()
        source = HotCopies(inner, lazy.bootstrap.blobs, devices)
        with pytest.raises(NotFoundError):
            source.read_range(hot.digest, 0, 10, time.monotonic() + 10)


@pytest.mark.parametrize("when", ["before the mount", "after it"])
def test_a_mount_reads_every_file_without_the_hot_blob(machine: Machine, tmp_path: Path, when: str) -> None:
    with running_registry(tmp_path / "registry") as registry:
        text = f"docker://{registry.host}/app:lazy"
        run_convert(make_image(tmp_path / "in"), text, prefetch=parse_prefetch(HOT))
        with contextlib.closing(Lazy(text)) as lazy:
            hot = next(blob for blob in lazy.bootstrap.blobs if blob.hot)
        target = machine.target()
        if when == "before the mount":
            registry.blob_path(str(hot.digest)).unlink()
            machine.mount(text, target)
        else:
            machine.mount(text, target, "--no-prefetch")
            registry.blob_path(str(hot.digest)).unlink()
        for name, content in contents().items():
            assert (target / name).read_bytes() == content
        log = next(machine.run_dir.glob("*/worker.log")).read_text()
        assert log.count("its hot blob is gone") == 1, log
        machine.umount(target)
        machine.assert_clean()
