"""
What the rows share: the images, the link, the registries, lazy versions of the images, the unpacked tree.

Each is made when a row first asks for it. One docker-registry answers on loopback (to push and convert, and for row
10), another one over the same storage at the far end of the shaped link.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.imagekit.build import TAG, build
from benchmarks.imagekit.layout import read_json
from benchmarks.imagekit.recipe import ML, WEB, Recipe
from benchmarks.kit.delay import start_delay
from benchmarks.kit.lazy import convert
from benchmarks.kit.link import Link, make_link
from benchmarks.kit.proc import ToolError, run
from benchmarks.kit.registry import Registry, start_registry

if TYPE_CHECKING:
    from benchmarks.kit.workspace import Workspace

IMAGES = Path("/var/tmp/lazyfs-bench")
_UNPACK_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Subject:
    """An image and the program that is started from it."""

    recipe: Recipe
    program: str  # for people
    command: list[str]


NUMPY = Subject(WEB, "numpy", ["python3", "-c", "import numpy"])
TENSORFLOW = Subject(
    ML, "tensorflow", ["python3", "-c", "import tensorflow as tf; print(float(tf.reduce_sum(tf.ones(4))))"]
)


class Session:
    """One run of `scripts/bench`."""

    def __init__(self, place: Workspace, runs: int) -> None:
        self.place = place
        self.runs = runs
        self._pushed: set[str] = set()
        self.rtt_ms = 0                    # of the far registry, for what asks `far_host` or `at_distance`
        self._distant: dict[int, str] = {}  # host:port of proxies to the far registry, by round trip

    def say(self, text: str) -> None:
        print(f"    {text}", flush=True)

    def layout(self, subject: Subject) -> Path:
        """The source image, as an OCI layout."""
        return build(subject.recipe, IMAGES, say=self.say)

    @cached_property
    def link(self) -> Link:
        return make_link(self.place)

    @cached_property
    def near(self) -> Registry:
        """The registry on loopback."""
        return start_registry(self.place)

    @cached_property
    def far(self) -> Registry:
        """The same images behind the link."""
        return start_registry(self.place, link=self.link)

    @property
    def far_host(self) -> str:
        """Where the far registry is reached at a round trip of `rtt_ms`; 0: with nothing in between."""
        if not self.rtt_ms:
            return self.far.host
        if self.rtt_ms not in self._distant:
            port = int(self.far.host.rpartition(":")[2])
            self._distant[self.rtt_ms] = start_delay(self.place, self.link, port + self.rtt_ms, port, self.rtt_ms)
        return self._distant[self.rtt_ms]

    def at_distance(self, reference: str) -> str:
        """A reference to the far registry, as it is reached now."""
        return reference.replace(self.far.host, self.far_host)

    def source(self, subject: Subject, registry: Registry) -> str:
        """The source image's reference in one of the registries."""
        name = subject.recipe.name
        if name not in self._pushed:
            self.near.push(self.layout(subject), name)
            self._pushed.add(name)
        return registry.reference(name, TAG)

    def lazy(self, subject: Subject, registry: Registry, tag: str = "lazy", *options: str) -> str:
        """The lazy image's reference; converted with `options` the first time a tag is asked for."""
        name = f"{subject.recipe.name}:{tag}"
        if name not in self._pushed:
            source = self.source(subject, self.near)
            convert(self.place, source, self.near.reference(subject.recipe.name, tag), *options)
            self._pushed.add(name)
        return registry.reference(subject.recipe.name, tag)

    def unpacked(self, subject: Subject) -> Path:
        """A source image unpacked by umoci, in the workspace; made once. For makers of other images."""
        bundle = self.place.top / f"unpacked-{subject.recipe.name}"
        if not bundle.exists():
            run(["umoci", "unpack", "--image", f"{self.layout(subject)}:{TAG}", bundle], timeout_s=_UNPACK_TIMEOUT_S)
        return bundle / "rootfs"

    @cached_property
    def tree(self) -> Path:
        """The large image unpacked by umoci, on ext4. Raises ToolError where the workspace is on something else."""
        kind = run(["findmnt", "-n", "-o", "FSTYPE", "-T", self.place.top], timeout_s=20).stdout.strip()
        if kind != "ext4":
            raise ToolError(f"{self.place.top} is on {kind}: the rows that compare with ext4 need ext4 there")
        self.say("unpacking the image for comparison")
        return self.unpacked(TENSORFLOW)

    @cached_property
    def large_layout(self) -> Path:
        """An image with one layer of 2 GB (uncompressed), kept beside the others."""
        from benchmarks.imagekit.large import build_large  # noqa: PLC0415 - one row's need

        return build_large(IMAGES, lambda: self.tree, self.place, say=self.say)


def layer_digests(layout: Path, tag: str) -> list[str]:
    """The digests of an image's layers, as its manifest in an OCI layout states them."""
    return [layer["digest"] for layer in _layers(layout, tag)]


def layers_bytes(layout: Path, tag: str) -> int:
    """The sum of an image's layer sizes, as its manifest in an OCI layout states them."""
    return sum(layer["size"] for layer in _layers(layout, tag))


def _layers(layout: Path, tag: str) -> list[dict[str, Any]]:
    index = json.loads((layout / "index.json").read_bytes())
    for entry in index["manifests"]:
        if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag:
            layers: list[dict[str, Any]] = read_json(layout, entry["digest"])["layers"]
            return layers
    raise ToolError(f"{layout} has no image {tag}")


def remove(path: Path) -> None:
    """Take a directory away, if it is there."""
    if os.path.lexists(path):
        shutil.rmtree(path)
