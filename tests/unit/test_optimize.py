"""`lazyfs optimize`: the image that a conversion with the list would have made, and nothing else is written."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from converter.compare import CheckOptions, check_image
from converter.optimize import OptimizeOptions
from converter.optimize import optimize as run
from lazyfs.cli.optimize import optimize_command
from lazyfs.errors import BusyError, FormatError, IntegrityError, NotFoundError, UsageError
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.registry import RegistryOptions, open_destination, open_source, own_name
from lazyfs.registry.layout import LayoutSource
from lazyfs.registry.select import select_image
from tests.convertkit import Layout, Lazy, run_convert
from tests.registrykit import Registry, running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.digest import Digest
    from lazyfs.registry.streams import FileStream

FIRST, SECOND = "b\nd/**\nno/such/file\n", "usr/a 100000-\nb 0-9\n"
NOISE = random.Random(5).randbytes(400_000)
ANNOTATIONS = {"annotations": {"org.opencontainers.image.title": "app", "containerd.io/x": "y"}}


def layers(salt: bytes = b"") -> list[bytes]:
    """Two equal layers among them: one blob, two devices."""
    lower = TarBuilder().file("usr/a", NOISE).file("b", b"B" * 200_000).file("empty", b"").build()
    upper = TarBuilder().file("d/e", salt + NOISE[1000:90_000]).file("d/f", b"text\n" * 30_000).build()
    return [lower, upper, lower]


@pytest.fixture
def source(tmp_path: Path) -> Layout:
    """`app` of a tool that writes no history, `old` of one that does; `multi`: two platforms."""
    layout = Layout(tmp_path / "in")
    layout.add_image("app", layers(), **ANNOTATIONS)
    history = [{"created_by": "x"}, {"created_by": "y", "empty_layer": True}, {"created_by": "z"}, {"comment": "é"},
               {"created_by": "too many"}]
    layout.add_image("old", layers(), config={"history": history, "author": "somebody"})
    members = [{**layout.add_image("", layers(salt), architecture=name), "annotations": {"n": name},
                "platform": {"os": "linux", "architecture": name}} for name, salt in (("amd64", b""), ("arm64", b"!"))]
    layout.index("multi", members, annotations={"a": "b"})
    return layout


class NoCopies:
    """Nothing is to be copied."""

    def copy_started(self, digest: Digest, size: int) -> None:
        raise AssertionError(f"{digest} of {size} bytes")

    copied = copy_done = copy_started


def optimize(image: str, *words: str, wanted: str | None = None) -> dict[str, Any]:
    """As the command does; `wanted`: the list's text, None: --no-prefetch."""
    chosen = ["--no-prefetch"] if wanted is None else ["--prefetch", "-"]
    result = CliRunner().invoke(optimize_command, [image, *words, *chosen, "--json"], input=wanted,
                                catch_exceptions=False)
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed


def files_below(path: Path) -> dict[str, tuple[int, int]]:
    """What is there: equal inode and time mean that nobody wrote it."""
    return {str(one.relative_to(path)): (one.stat().st_ino, one.stat().st_mtime_ns)
            for one in path.rglob("*") if one.is_file()}


@pytest.mark.parametrize("tag", ["app", "old", "multi"])
@pytest.mark.parametrize(("before", "after"), [(None, FIRST), (FIRST, SECOND), (SECOND, None), (FIRST, "nothing\n")])
def test_it_equals_a_conversion_with_that_list(
    tmp_path: Path, source: Layout, tag: str, before: str | None, after: str | None
) -> None:
    def converted(text: str | None, where: str) -> str:
        name = f"oci:{tmp_path}/{where}:lazy"
        run_convert(source.reference(tag), name, prefetch=None if text is None else parse_prefetch(text),
                    all_platforms=tag == "multi")
        return name

    optimized, expected = converted(before, "optimized"), converted(after, "expected")
    printed = optimize(optimized, wanted=after)
    found, wanted = (open_source(name, RegistryOptions()).root() for name in (optimized, expected))
    assert found == wanted
    assert printed["digest"] == wanted.digest.text
    blobs = tmp_path / "expected/blobs/sha256"
    for blob in blobs.iterdir():
        assert (tmp_path / "optimized/blobs/sha256" / blob.name).read_bytes() == blob.read_bytes()
    for platform in ("linux/amd64", "linux/arm64") if tag == "multi" else ("linux/amd64",):
        lazy = Lazy(optimized, platform=platform)
        assert lazy.verify()
        assert lazy.read(b"usr/a") == NOISE


def test_nothing_else_is_written(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("app"), image)
    before = files_below(tmp_path / "out")
    printed = optimize(image, wanted=FIRST)
    after = files_below(tmp_path / "out")
    changed = {name for name in after if after[name] != before.get(name)}
    lazy = Lazy(image)
    assert lazy.manifest.hot is not None
    new = [lazy.document.digest, lazy.manifest.hot.digest, lazy.manifest.bootstrap.digest, lazy.manifest.config.digest]
    assert changed - {"index.json", ".lazyfs.lock"} == {f"blobs/sha256/{digest.hex}" for digest in new}
    assert set(before) <= set(after)
    (one,) = printed["images"]
    assert (one["hot"]["bytes"], one["hot"]["chunks"]) == (lazy.manifest.hot.size, 1)
    assert one["hot"]["uncompressedBytes"] == len(lazy.hot_blocks()) * 4096 == 442_368
    assert one["coverage"]["missing"] == ["no/such/file"]
    assert printed["copiedBytes"] == 0
    written = files_below(tmp_path / "out")
    optimize(image, wanted=FIRST)
    assert {name for name, state in files_below(tmp_path / "out").items() if state != written[name]} <= {"index.json"}


def test_an_optimized_image_is_its_source(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("app"), image)
    optimize(image, wanted=FIRST)
    optimize(image, wanted=SECOND)
    places = [open_source(name, RegistryOptions()) for name in (image, source.reference("app"))]
    options = CheckOptions(2, lambda *_: None, lambda *_: None, lambda *_: None)
    result = check_image(places[0], select_image(places[0], None), options, places[1], None)
    assert result.differences.total == 0
    assert result.file_count


def test_one_image_of_an_index(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("multi"), image, all_platforms=True)
    before = {name: Lazy(image, platform=f"linux/{name}").document for name in ("amd64", "arm64")}
    other = f"oci:{tmp_path}/other:lazy"
    assert len(optimize(image, other, "--platform", "linux/arm64", wanted=FIRST)["images"]) == 1
    assert Lazy(other, platform="linux/amd64").document == before["amd64"]
    assert Lazy(other, platform="linux/amd64").verify() == Lazy(other, platform="linux/arm64").verify()
    assert Lazy(other, platform="linux/arm64").manifest.hot is not None
    assert Lazy(image, platform="linux/arm64").document == before["arm64"]     # where it came from
    with pytest.raises(NotFoundError):
        optimize(image, "--platform", "linux/s390x", wanted=FIRST)


def test_archives(tmp_path: Path, source: Layout) -> None:
    archive, target = f"oci-archive:{tmp_path}/app.tar", f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("app"), f"{archive}:web")
    optimize(archive, wanted=FIRST)         # by its own name, which the reference does not even say
    assert own_name(archive) == f"{archive}:web"
    lazy = Lazy(f"{archive}:web")
    assert lazy.manifest.hot is not None
    assert lazy.verify()
    lazy.close()
    optimize(archive, target, wanted=FIRST)
    with contextlib.closing(open_source(archive, RegistryOptions())) as first:
        assert first.root() == open_source(target, RegistryOptions()).root()
    assert optimize(target, f"oci-archive:{tmp_path}/new.tar", wanted=FIRST)["copiedBytes"] == 0     # linked
    lazy = Lazy(f"oci-archive:{tmp_path}/new.tar")
    assert lazy.verify()
    lazy.close()


def test_where_it_goes_must_be_clear(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    digest = run_convert(source.reference("app"), image).digest
    for name in (f"oci:{tmp_path}/out@{digest}", f"registry.example/app@{digest}"):
        with pytest.raises(UsageError, match="by its digest"):
            own_name(name)
    assert own_name(f"oci:{tmp_path}/out") == image
    assert own_name("registry.example/app:lazy") == "registry.example/app:lazy"
    with pytest.raises(UsageError, match="either --prefetch LIST or --no-prefetch"):
        CliRunner().invoke(optimize_command, [image], catch_exceptions=False)
    with pytest.raises(FormatError, match="not a lazy image"):
        optimize(source.reference("app"), wanted=FIRST)
    with pytest.raises(FormatError, match="not a lazy image"):
        optimize(source.reference("multi"), wanted=FIRST)


def test_scattered_chunks_are_read_several_at_a_time(
    tmp_path: Path, source: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("app"), image)
    both = threading.Barrier(2, timeout=20)      # a read that is alone never gets past it
    read = LayoutSource.read_range

    def together(self: LayoutSource, *words: Any) -> FileStream:
        both.wait()
        return read(self, *words)

    monkeypatch.setattr(LayoutSource, "read_range", together)
    assert optimize(image, wanted="usr/a 0-0,200000-200000\n")["images"][0]["hot"]["extents"] == 2


def test_an_image_that_came_meanwhile_is_not_replaced(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    old = run_convert(source.reference("app"), image).digest
    new = run_convert(source.reference("old"), image).digest
    options = OptimizeOptions(parse_prefetch(FIRST), None, f"oci:{tmp_path}/out", replaces=True)
    with contextlib.closing(open_source(f"oci:{tmp_path}/out@{old}", RegistryOptions())) as opened, \
            contextlib.closing(open_destination(image, RegistryOptions())) as place:
        with pytest.raises(BusyError, match="another image meanwhile"):
            run(opened, place, options, NoCopies())
        assert place.reader().root().digest == new


def test_damage_is_found_before_anything_is_named_anew(tmp_path: Path, source: Layout) -> None:
    image = f"oci:{tmp_path}/out:lazy"
    run_convert(source.reference("app"), image, prefetch=parse_prefetch(FIRST))
    lazy = Lazy(image)
    blob = lazy.manifest.layers[0]
    path = tmp_path / "out/blobs/sha256" / blob.digest.hex
    data = bytearray(path.read_bytes())
    data[150_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        optimize(image, wanted=SECOND)
    assert open_source(image, RegistryOptions()).root() == lazy.document


# --- registries -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Registry]]:
    path = tmp_path_factory.mktemp("optimize")
    with running_registry(path) as first, running_registry(path) as second:
        layout = Layout(path / "in")
        layout.add_image("app", layers())
        run_convert(layout.reference("app"), f"docker://{first.host}/app:lazy")
        yield [first, second]


def test_another_repository_mounts_another_registry_copies(registries: list[Registry]) -> None:
    image = f"docker://{registries[0].host}/app:lazy"
    before = Lazy(image)
    names = [f"docker://{registries[0].host}/app:hot", f"docker://{registries[0].host}/team/other:hot",
             f"docker://{registries[1].host}/app:hot"]
    copied = [optimize(image, name, wanted=FIRST)["copiedBytes"] for name in names]
    assert copied == [0, 0, sum({layer.digest: layer.size for layer in before.manifest.layers}.values())]
    optimized = [Lazy(name) for name in names]
    assert len({lazy.document.digest for lazy in optimized}) == 1
    for lazy in [*optimized, before]:
        assert lazy.verify()
        lazy.close()
    again = Lazy(image)
    assert again.document == before.document      # only DST has the hot part
    again.close()
    assert optimize(image, names[2], wanted=SECOND)["copiedBytes"] == 0


def test_a_tag_is_replaced(registries: list[Registry]) -> None:
    host = registries[0].host
    optimize(f"docker://{host}/app:lazy", f"docker://{host}/app:mine", wanted=FIRST)
    printed = optimize(f"{host}/app:mine", wanted=SECOND)
    lazy = Lazy(f"docker://{host}/app:mine")
    assert lazy.document.digest.text == printed["digest"] != printed["sourceDigest"]
    assert lazy.verify()
    lazy.close()
