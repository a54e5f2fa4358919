"""
Which image of an index is meant: by platform, `os/architecture[/variant]` as in OCI image-spec v1.1 image-index.md.

Layer: lazyfs.registry. Who calls: mount, inspect, check, converter.
"""

from __future__ import annotations

import platform as host
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError, NotFoundError, UsageError
from lazyfs.image.config import parse_config
from lazyfs.image.oci import INDEX_TYPES, Index, is_index, parse_index, parse_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.image.descriptor import Descriptor, Document
    from lazyfs.registry.place import ImageSource

_NESTING_MAX = 4                 # an index may name indexes
_ARCHITECTURES = {               # `uname -m` -> GOARCH, which OCI uses
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386",
    "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64", "loongarch64": "loong64", "mips64": "mips64le",
}
_HOST_VARIANTS = {"armv7l": "v7", "armv6l": "v6"}
_IMPLIED_VARIANTS = {"arm64": "v8", "arm": "v7"}   # containerd platforms.Normalize: what no variant means


@dataclass(frozen=True, slots=True)
class Platform:
    """Where an image runs; `variant` may be empty."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def accepts(self, other: Platform) -> bool:
        """Whether an image for `other` is what was asked for; no variant means the architecture's usual one."""
        implied = _IMPLIED_VARIANTS.get(self.architecture, "")
        return (self.os, self.architecture, self.variant or implied) == (
            other.os, other.architecture, other.variant or implied,
        )


def parse_platform(text: str) -> Platform:
    """Raises UsageError unless `text` is os/architecture[/variant]."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(part.isascii() and part.replace("_", "").isalnum() for part in parts):
        raise UsageError(f"platform {text[:100]!r}: expected OS/ARCHITECTURE[/VARIANT]", hint="for example linux/arm64")
    return Platform(*parts)


def host_platform() -> Platform:
    """The platform of this machine's containers."""
    machine = host.machine()
    return Platform("linux", _ARCHITECTURES.get(machine, machine), _HOST_VARIANTS.get(machine, ""))


def descriptor_platform(platform: Mapping[str, object] | None) -> Platform | None:
    """The platform that an index states for a manifest; None: none, or `unknown` (attestations and the like)."""
    fields = [str((platform or {}).get(key) or "") for key in ("os", "architecture", "variant")]
    return Platform(*fields) if fields[0] not in ("", "unknown") and fields[1] else None


def platform_text(descriptor: Descriptor) -> str:
    """The platform that an index states for a manifest, as os/architecture[/variant]; "" if none."""
    return str(descriptor_platform(descriptor.platform) or "")


def select_platform(index: Index, platform: str | None, *, name: str = "index") -> Descriptor:
    """
    The manifest of one platform out of an index, by what the index itself says.

    Args:
        index: the index; manifests without a platform (attestations) are not candidates.
        platform: `os/architecture[/variant]`; None: this machine's, or the only one there is.
        name: what to call the index in a message.

    Raises:
        NotFoundError: there is no such platform; the message lists what there is.

    """
    stated = [(descriptor_platform(member.platform), member) for member in index.manifests]
    return _choose(name, [(found, member) for found, member in stated if found is not None], platform)


def select_image(source: ImageSource, platform: str | None) -> Document:
    """
    The manifest of one platform.

    Args:
        source: where the reference names a manifest or an index.
        platform: `os/architecture[/variant]`; None: this machine's, or whatever it is if there is only one.

    Raises:
        NotFoundError: there is no such platform; the message lists what there is.
        FormatError: a document is off.

    """
    root = source.root()
    if is_index(root.media_type, root.data):
        return source.document(_choose(source.name, _images(source, root, _NESTING_MAX), platform).digest)
    if platform is not None:
        wanted, found = parse_platform(platform), _config_platform(source, root)
        if found is None or not wanted.accepts(found):
            raise _not_there(source.name, wanted, [found])
    return root


def _choose(name: str, images: list[tuple[Platform | None, Descriptor]], platform: str | None) -> Descriptor:
    wanted = parse_platform(platform) if platform is not None else host_platform()
    if platform is None and len(images) == 1:
        return images[0][1]
    for found, descriptor in images:
        if found is not None and wanted.accepts(found):
            return descriptor
    raise _not_there(name, wanted, [found for found, _ in images])


def _images(source: ImageSource, index: Document, depth: int) -> list[tuple[Platform | None, Descriptor]]:
    """All images an index names, those of indexes within it too."""
    if depth == 0:
        raise FormatError(f"{source.name}: indexes within indexes, deeper than {_NESTING_MAX}")
    images: list[tuple[Platform | None, Descriptor]] = []
    for descriptor in parse_index(index.data, index.media_type).manifests:
        stated = descriptor_platform(descriptor.platform)
        if descriptor.media_type in INDEX_TYPES:
            images += _images(source, source.document(descriptor.digest), depth - 1)
        elif stated is not None:
            images.append((stated, descriptor))
        elif descriptor.platform is None:    # OCI directories often state none
            found = _config_platform(source, source.document(descriptor.digest))
            images += [(found, descriptor)] if found is not None else []
        if len(images) > limits.INDEX_MANIFEST_COUNT_MAX:
            raise FormatError(f"{source.name}: more than {limits.INDEX_MANIFEST_COUNT_MAX} images in one index")
    return images


def _config_platform(source: ImageSource, document: Document) -> Platform | None:
    """The platform that an image's own config states; None if it has no such config (an artifact)."""
    manifest = parse_manifest(document.data, document.media_type)
    if manifest.config.size > limits.CONFIG_BYTES_MAX:
        raise FormatError(f"{source.name}: config of {manifest.config.size} bytes")
    try:
        config = parse_config(source.read_blob(manifest.config.digest, manifest.config.size), len(manifest.layers))
    except FormatError:
        return None
    return Platform(config.os, config.architecture, config.variant)


def _not_there(name: str, wanted: Platform, found: list[Platform | None]) -> NotFoundError:
    names = sorted({str(platform) for platform in found if platform is not None})
    return NotFoundError(
        f"{name}: no image for {wanted}; found {', '.join(names) or 'none with a platform'}",
        hint=f"choose one with --platform, for example --platform {names[0]}" if names else "",
    )
