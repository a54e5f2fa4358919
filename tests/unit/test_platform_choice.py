"""Which image of an index is meant: platforms, variants, attestations, nested indexes, single images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import FormatError, LazyfsError, NotFoundError, UsageError
from lazyfs.image.oci import parse_index
from lazyfs.registry import RegistryOptions, open_source
from lazyfs.registry.select import Platform, host_platform, parse_platform, platform_text, select_image, select_platform
from tests.convertkit import Layout
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

TAR = TarBuilder().file("f", b"x").build()


def member(layout: Layout, architecture: str, variant: str = "", *, state: bool = True) -> dict:
    extra = {"variant": variant} if variant else {}
    descriptor = layout.add_image("", [TAR], architecture=architecture, config=extra)
    return {**descriptor, "platform": {"os": "linux", "architecture": architecture, **extra}} if state else descriptor


def chosen(layout: Layout, tag: str, platform: str | None) -> str:
    source = open_source(layout.reference(tag), RegistryOptions())
    try:
        return select_image(source, platform).digest.text
    finally:
        source.close()


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "in")


@pytest.mark.parametrize("text", ["linux", "", "linux/", "/amd64", "linux/amd64/v1/x", "linux/am d64", "línux/amd64",
    "a/b/"])
def test_malformed_platforms(text: str) -> None:
    with pytest.raises(UsageError):
        parse_platform(text)


def test_variants() -> None:
    arm64, v7 = Platform("linux", "arm64"), Platform("linux", "arm", "v7")
    assert arm64.accepts(Platform("linux", "arm64", "v8"))
    assert Platform("linux", "arm64", "v8").accepts(arm64)
    assert v7.accepts(Platform("linux", "arm"))
    assert not v7.accepts(Platform("linux", "arm", "v6"))
    assert not arm64.accepts(Platform("windows", "arm64"))
    assert str(parse_platform("linux/arm/v7")) == "linux/arm/v7"
    assert host_platform().os == "linux"


def test_index_by_platform(layout: Layout) -> None:
    members = [member(layout, "amd64"), member(layout, "arm", "v6"), member(layout, "arm", "v7"), member(layout,
    "arm64", "v8")]
    attestation = {**member(layout, "riscv64"), "platform": {"os": "unknown", "architecture": "unknown"}}
    layout.index("i", [attestation, *members])
    for wanted, expected in (("linux/amd64", 0), ("linux/arm/v6", 1), ("linux/arm", 2), ("linux/arm64", 3)):
        assert chosen(layout, "i", wanted) == members[expected]["digest"]
    with pytest.raises(NotFoundError, match="no image for linux/s390x; found linux/amd64, linux/arm/v6") as caught:
        chosen(layout, "i", "linux/s390x")
    assert "--platform" in caught.value.hint
    with pytest.raises(NotFoundError):
        chosen(layout, "i", "linux/riscv64")


def test_the_only_image_of_an_index_needs_no_platform(layout: Layout) -> None:
    only = member(layout, "s390x")
    attestation = {**member(layout, "mips"), "platform": {"os": "unknown", "architecture": "unknown"}}
    layout.index("i", [only, attestation])
    assert chosen(layout, "i", None) == only["digest"]
    source = parse_index((layout.blobs / layout.index("j", [only, attestation])["digest"][7:]).read_bytes(), "")
    assert select_platform(source, None).digest.text == only["digest"]
    assert platform_text(select_platform(source, "linux/s390x")) == "linux/s390x"


def test_members_without_a_platform_are_known_by_their_config(layout: Layout) -> None:
    one, two = member(layout, "amd64", state=False), member(layout, "arm64", "v8", state=False)
    layout.index("i", [one, two])
    assert chosen(layout, "i", "linux/arm64") == two["digest"]


def test_indexes_within_indexes(layout: Layout) -> None:
    inner = member(layout, "s390x")
    descriptor = layout.index("", [inner])
    layout.index("i", [member(layout, "amd64"), descriptor])
    assert chosen(layout, "i", "linux/s390x") == inner["digest"]
    for _ in range(5):
        descriptor = layout.index("", [descriptor])
    layout.index("deep", [descriptor])
    with pytest.raises(FormatError, match="within indexes"):
        chosen(layout, "deep", "linux/s390x")


def test_a_single_image_must_be_of_the_platform_that_was_asked_for(layout: Layout) -> None:
    digest = layout.add_image("a", [TAR], architecture="arm64", config={"variant": "v8"})["digest"]
    assert chosen(layout, "a", None) == digest
    assert chosen(layout, "a", "linux/arm64") == digest
    with pytest.raises(NotFoundError, match="found linux/arm64/v8"):
        chosen(layout, "a", "linux/amd64")


def test_an_empty_index(layout: Layout) -> None:
    layout.index("i", [])
    with pytest.raises(LazyfsError):
        chosen(layout, "i", None)
