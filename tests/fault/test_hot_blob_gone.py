"""A hot blob that is gone from its registry: the image is read all the same, out of the layers' own blobs."""

from __future__ import annotations

import contextlib
import random
from typing import TYPE_CHECKING

import pytest

from lazyfs.image.prefetch import parse_prefetch
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
    """Two layers with hot blocks, one below them without any."""
    files = contents()
    other = TarBuilder().file("etc/other", random.Random(8).randbytes(2 * CHUNK)).build()
    base = TarBuilder()
    for name in ("data/early", "data/text", "data/late"):
        base.file(name, files[name])
    top = TarBuilder().file("data/early-again", files["data/early-again"]).file("bin/new", files["bin/new"]).build()
    layout = Layout(path)
    layout.add_image("app", [other, base.build(), top])
    return layout.reference("app")


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
@pytest.mark.parametrize("when", ["before the mount", "after it"])
def test_a_mount_reads_every_file_without_the_hot_blob(
    machine: Machine, tmp_path: Path, when: str, driver: str
) -> None:
    with running_registry(tmp_path / "registry") as registry:
        text = f"docker://{registry.host}/app:lazy"
        run_convert(make_image(tmp_path / "in"), text, prefetch=parse_prefetch(HOT))
        with contextlib.closing(Lazy(text)) as lazy:
            hot = next(blob for blob in lazy.bootstrap.blobs if blob.hot)
        target = machine.target()
        if when == "before the mount":
            registry.blob_path(str(hot.digest)).unlink()
            machine.mount(text, target, "--driver", driver)
        else:
            machine.mount(text, target, "--no-prefetch", "--driver", driver)
            registry.blob_path(str(hot.digest)).unlink()
        for name, content in contents().items():
            assert (target / name).read_bytes() == content
        log = next(machine.run_dir.glob("*/worker.log")).read_text()
        assert log.count("the hot part cannot be had") == 1, log
        statistics = machine.statistics()["fetch"]
        assert statistics["errors"] == 0
        assert statistics["hot_reads"] == 0
        machine.umount(target)
        machine.assert_clean()


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_hot_files_are_read_from_the_hot_blob_alone(machine: Machine, tmp_path: Path, driver: str) -> None:
    with running_registry(tmp_path / "registry") as registry:
        text = f"docker://{registry.host}/app:lazy"
        run_convert(make_image(tmp_path / "in"), text, prefetch=parse_prefetch(HOT))
        with contextlib.closing(Lazy(text)) as lazy:
            for blob in lazy.bootstrap.blobs:
                if not blob.hot:
                    registry.blob_path(str(blob.digest)).unlink()
        target = machine.target()
        machine.mount(text, target, "--driver", driver)
        for name in ("bin/new", "data/early"):
            assert (target / name).read_bytes() == contents()[name]
        with (target / "data/late").open("rb") as file:
            file.seek(1_001_472)     # the next page after where the hot part of it begins
            assert file.read(CHUNK) == contents()["data/late"][1_001_472 : 1_001_472 + CHUNK]
        statistics = machine.statistics()["fetch"]
        assert statistics["errors"] == 0
        assert statistics["hot_reads"] > 0
        machine.umount(target)
        machine.assert_clean()
