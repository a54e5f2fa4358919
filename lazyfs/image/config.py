"""
The image config: what is read of it, and what becomes of it in the lazy image.

Everything is kept as it stands, byte for byte, but `rootfs.diff_ids` (the lazy image has other layers) and `history`
(one entry a layer must remain, OCI image-spec v1.1 config.md: entries that are not `empty_layer` count the layers).

Layer: lazyfs.image, no I/O. Who calls: lazyfs.image.manifest, lazyfs.registry.select, converter.compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.digest import Digest
from lazyfs.image.oci import DOCKER_CONFIG, OCI_CONFIG, Manifest, decode_json, encode_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EMPTY_LAYER = "empty_layer"


class _JsonRootfs(msgspec.Struct):
    diff_ids: list[str]
    type: str = "layers"


class _JsonConfig(msgspec.Struct):
    architecture: str
    os: str
    rootfs: _JsonRootfs
    variant: str | None = None


class _JsonHistory(msgspec.Struct):
    empty_layer: bool | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """What lazyfs itself needs of a config. `diff_ids`: of the layers' uncompressed tars, lowest first."""

    os: str
    architecture: str
    variant: str
    diff_ids: tuple[Digest, ...]


def parse_config(data: bytes, layer_count: int) -> Config:
    """
    Read an image config.

    Raises:
        FormatError: malformed, or it does not name as many layers as the manifest.

    """
    raw = decode_json(data, _JsonConfig, "image config", limits.CONFIG_BYTES_MAX)
    if raw.rootfs.type != "layers" or len(raw.rootfs.diff_ids) != layer_count:
        raise FormatError(f"image config names {len(raw.rootfs.diff_ids)} layers, the manifest {layer_count}")
    return Config(raw.os, raw.architecture, raw.variant or "", tuple(map(Digest, raw.rootfs.diff_ids)))


def check_config_type(manifest: Manifest) -> None:
    """Raises UnsupportedError unless the manifest is that of a container image."""
    if manifest.config.media_type not in (OCI_CONFIG, DOCKER_CONFIG):
        kind = manifest.artifact_type or manifest.config.media_type
        raise UnsupportedError(
            f"not a container image: its config has media type {kind[:200]!r}",
            hint="only images that a container can run from can be used (no charts, signatures, plugins)",
        )


def build_config(source: bytes, layer_count: int, diff_ids: Sequence[Digest], added: Sequence[str]) -> bytes:
    """
    The lazy image's config.

    Args:
        source: the source image's config.
        layer_count: how many layers the source image has.
        diff_ids: of all layers of the lazy image.
        added: a comment for each layer that the source image does not have.

    """
    parse_config(source, layer_count)
    fields = decode_json(source, dict[str, msgspec.Raw], "image config", limits.CONFIG_BYTES_MAX)
    rootfs = decode_json(bytes(fields["rootfs"]), dict[str, msgspec.Raw], "image config", limits.CONFIG_BYTES_MAX)
    new_rootfs: dict[str, object] = {**rootfs, "diff_ids": [digest.text for digest in diff_ids]}
    history = _history(fields.get("history"), layer_count)
    history += [{"created_by": "lazyfs convert", "comment": comment} for comment in added]
    return encode_json({**fields, "rootfs": new_rootfs, "history": history})


def without_added(config: bytes, diff_ids: Sequence[Digest], added_count: int) -> bytes:
    """
    A lazy image's config as a source of build_config(), which makes the same config of it again.

    Args:
        config: the lazy image's config.
        diff_ids: of the source's layers.
        added_count: how many layers the source does not have, all of them last.

    Raises:
        FormatError: the config does not have those layers.

    """
    parse_config(config, len(diff_ids) + added_count)
    fields = decode_json(config, dict[str, msgspec.Raw], "image config", limits.CONFIG_BYTES_MAX)
    rootfs = decode_json(bytes(fields["rootfs"]), dict[str, msgspec.Raw], "image config", limits.CONFIG_BYTES_MAX)
    history = _history(fields.get("history"), len(diff_ids) + added_count)
    kept: dict[str, object] = {**rootfs, "diff_ids": [digest.text for digest in diff_ids]}
    return encode_json({**fields, "rootfs": kept, "history": history[: len(history) - added_count]})


def comparable(config: bytes) -> Mapping[str, object]:
    """All of a config that conversion must not change, for `lazyfs check`."""
    fields = decode_json(config, dict[str, object], "image config", limits.CONFIG_BYTES_MAX)
    rootfs = fields.get("rootfs")
    kept = {key: value for key, value in fields.items() if key not in ("rootfs", "history")}
    if isinstance(rootfs, dict):
        kept["rootfs"] = {key: value for key, value in rootfs.items() if key != "diff_ids"}
    return kept


def _history(raw: msgspec.Raw | None, layer_count: int) -> list[object]:
    """The source's history, mended where it does not have exactly one entry a layer (many tools write none)."""
    entries = decode_json(bytes(raw or b"null"), list[dict[str, msgspec.Raw]] | None, "history",  # type: ignore[arg-type]
                          limits.CONFIG_BYTES_MAX) or []
    history: list[object] = []
    count = 0
    for entry in entries:
        shape = decode_json(encode_json(entry), _JsonHistory, "history", limits.CONFIG_BYTES_MAX)
        if not shape.empty_layer:
            count += 1
            if count > layer_count:
                history.append({**entry, _EMPTY_LAYER: True})
                continue
        history.append(entry)
    missing = max(layer_count - count, 0)
    return history + [{"comment": "no history in the source image"}] * missing
