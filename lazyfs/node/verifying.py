"""
Whether somebody whom this node trusts has signed an image: asked before it is mounted, or fetched on request.

What is verified is a chain: key -> payload -> digest of the manifest (or of an index that names it) -> the bootstrap
layer, compressed or not; from there each chunk has its digest. What the snapshotter, a label or a tag says is a hint
where to look, and never believed. What was verified is kept as *evidence*, not as a verdict, beside the bootstrap: the
next mount of the same image verifies it again, with the keys of that day, and asks no registry.

Layer: node. Who calls: node.worker before each mount, never for a mount that is taken over; node.fetching. Policy
"warn" says in the log what "enforce" refuses. State: the settings (set once a process), files
CACHE/signatures/<hex of the layer>.json.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from lazyfs import limits, shapes
from lazyfs.errors import FormatError, LazyfsError, NotFoundError, SignatureError, UsageError
from lazyfs.image.digest import Digest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.config import Verify, VerifyRule
    from lazyfs.image.descriptor import Document
    from lazyfs.image.keys import PublicKey
    from lazyfs.node.order import MountOrder
    from lazyfs.registry.place import ImageSource

_BOOTSTRAP_KEY = "containerd.io/snapshot/lazyfs.bootstrap"
_EVIDENCE_BYTES_MAX = 6 * limits.MANIFEST_BYTES_MAX     # manifest, index and config, in base64
_EVIDENCE_COUNT_MAX = 1024                              # images of a node; those used longest ago go first
_log = logging.getLogger("lazyfs.node")
_set: list[Verify] = []


class Evidence(msgspec.Struct):
    """All that shows that a bootstrap layer is signed. `index`, `config`: empty where they are not needed."""

    payload: bytes
    value: bytes
    manifest: bytes
    manifest_type: str
    index: bytes = b""
    config: bytes = b""


def set_node_verify(settings: Verify) -> None:
    """Section [verify] of the configuration, before the first mount."""
    _set[:] = [settings]


def rule_for(image: str, settings: Verify) -> Verify | VerifyRule:
    """The rule of the longest name that `image` is in: HOST, HOST/REPOSITORY or a part of it up to a slash."""
    from lazyfs.registry.reference import RegistryReference, parse_reference  # noqa: PLC0415

    if not settings.rule:
        return settings
    reference = parse_reference(image)
    if isinstance(reference, RegistryReference):
        name = f"{reference.host}/{reference.repository}"
        while name:
            if name in settings.rule:
                return settings.rule[name]
            name = name.rpartition("/")[0]
    return settings


async def admit(order: MountOrder, cache_dir: Path) -> MountOrder:
    """
    The order, if its image may be used; named by the manifest that was verified.

    Raises:
        SignatureError: policy "enforce", and nobody trusted has signed it. LazyfsError: it could not be found out.

    """
    if not _set:
        return order
    rule = rule_for(order.image, _set[0])
    if rule.policy == "off":
        return order
    try:
        return await trio.to_thread.run_sync(_verify, order, cache_dir, rule, abandon_on_cancel=True)
    except LazyfsError as error:
        if rule.policy == "enforce":
            raise
        _log.warning("%s is used all the same (verify.policy is warn): %s", order.image, error)
        return order


def _verify(order: MountOrder, cache_dir: Path, rule: Verify | VerifyRule) -> MountOrder:
    keys = load_keys(rule.keys)
    deadline = time.monotonic() + _set[0].timeout_s
    wanted = None if order.layer is None else Digest(order.layer[0])
    if wanted is not None and (known := _read(cache_dir, wanted)) is not None:
        with contextlib.suppress(LazyfsError):    # keys have changed, or it was damaged: looked for again
            check_evidence(known, keys, wanted)
            return order
    from lazyfs.registry import open_source  # noqa: PLC0415 - evidence is there most of the time

    options = order.registry_options()
    options = replace(options, request_deadline_s=min(options.request_deadline_s, _set[0].timeout_s))
    with contextlib.closing(open_source(order.image, options)) as source:
        manifest = _manifest(source, order, deadline)
        layer, _ = _bootstrap_of(manifest)
        if wanted is None:
            order = replace(order, document=base64.b64encode(manifest.data).decode(),
                            document_type=manifest.media_type)
            known = _read(cache_dir, layer)
            if known is not None and known.manifest == manifest.data:
                with contextlib.suppress(LazyfsError):
                    check_evidence(known, keys, layer)
                    return order
        config = b"" if wanted in {None, layer} else _config(source, manifest)
        found, key = find_evidence(
            source, manifest, keys, wanted=wanted or layer, config=config, deadline=deadline)
    _write(cache_dir, wanted or layer, found)
    _log.info("%s: signed by %s", order.image, key.name)
    return order


def load_keys(paths: tuple[str, ...]) -> list[PublicKey]:
    """Read anew each time: keys may be rotated without a restart. Raises UsageError: one cannot be read."""
    from lazyfs.image.keys import load_public_keys  # noqa: PLC0415

    keys: list[PublicKey] = []
    for path in paths:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise UsageError(f"verify.keys: {path}: {error.strerror}",
                             hint="no image can be verified without it") from error
        keys += load_public_keys(data, path)
    return keys


def find_evidence(
    source: ImageSource, manifest: Document, keys: list[PublicKey], *, wanted: Digest, config: bytes, deadline: float
) -> tuple[Evidence, PublicKey]:
    """
    What shows that the manifest is signed by one of the keys, and by which.

    Raises:
        SignatureError: nothing does. SourceError: the registry could not be asked.

    """
    reasons: list[str] = []
    for index, payload, value in _signatures(source, manifest, deadline):
        evidence = Evidence(payload, value, manifest.data, manifest.media_type, index, config)
        try:
            return evidence, check_evidence(evidence, keys, wanted)
        except LazyfsError as error:
            reasons.append(str(error))
    if not reasons:
        raise SignatureError(f"{source.name}: nobody has signed {manifest.digest.text}",
                             hint="sign it (cosign sign, lazyfs sign), or see verify.policy in docs/signatures.md")
    raise SignatureError(f"{source.name}: none of the {len(reasons)} signatures of {manifest.digest.text} counts: "
                         f"{reasons[-1]}", hint="is its key in verify.keys? docs/signatures.md")


def check_evidence(evidence: Evidence, keys: list[PublicKey], wanted: Digest) -> PublicKey:
    """
    The key that vouches for a bootstrap layer.

    Args:
        evidence: from wherever; none of it is believed.
        keys: those trusted.
        wanted: the layer's digest, stored or uncompressed.

    Raises:
        SignatureError: none does. FormatError: a part of it is malformed.

    """
    from lazyfs.image.config import parse_config  # noqa: PLC0415
    from lazyfs.image.descriptor import Document  # noqa: PLC0415
    from lazyfs.image.oci import parse_index, parse_manifest  # noqa: PLC0415
    from lazyfs.image.signature import parse_payload  # noqa: PLC0415

    key = next((one for one in keys if one.verifies(evidence.value, evidence.payload)), None)
    if key is None:
        raise SignatureError("it is by none of the keys that are trusted")
    subject, claimed = Digest.of(evidence.index or evidence.manifest), parse_payload(evidence.payload)
    if claimed != subject:
        raise SignatureError(f"it is for another image, {claimed.short}")
    digest = Digest.of(evidence.manifest)
    if evidence.index and digest not in {one.digest for one in parse_index(evidence.index, "").manifests}:
        raise SignatureError("it is for an index that does not name this image")
    document = Document(evidence.manifest, evidence.manifest_type, digest)
    layer, place = _bootstrap_of(document)
    if layer == wanted:
        return key
    manifest = parse_manifest(document.data, document.media_type)
    if evidence.config and Digest.of(evidence.config) == manifest.config.digest and (
            parse_config(evidence.config, len(manifest.layers)).diff_ids[place] == wanted):
        return key
    raise SignatureError(f"it is for an image with another bootstrap than {wanted.short}",
                         hint="the tag has moved since the image was pulled: pull it again")


def _signatures(source: ImageSource, manifest: Document, deadline: float) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Index (or b"", if the manifest itself is meant), payload, value."""
    from lazyfs.image.oci import is_index, parse_index  # noqa: PLC0415
    from lazyfs.registry.signatures import find_signatures  # noqa: PLC0415

    for payload, value in find_signatures(source, manifest.digest, deadline):
        yield b"", payload, value
    with contextlib.suppress(NotFoundError, FormatError):      # the tag has gone since
        root = source.root()
        if is_index(root.media_type, root.data) and manifest.digest in {
                one.digest for one in parse_index(root.data, root.media_type).manifests}:
            for payload, value in find_signatures(source, root.digest, deadline):
                yield root.data, payload, value


def _manifest(source: ImageSource, order: MountOrder, deadline: float) -> Document:
    """The image's manifest: as the starter has found it, as containerd pulled it, or by its reference."""
    from lazyfs.image.descriptor import Document  # noqa: PLC0415
    from lazyfs.registry.referrers import ReferrersPlace  # noqa: PLC0415
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    if order.document is not None:
        data = base64.b64decode(order.document)
        return Document(data, order.document_type, Digest.of(data))
    if order.manifest and isinstance(source, ReferrersPlace):
        return source.named(Digest(order.manifest), deadline)
    return select_image(source, order.platform)


def _bootstrap_of(manifest: Document) -> tuple[Digest, int]:
    """Digest and place of the bootstrap layer. Raises SignatureError: there is none."""
    from lazyfs.image.oci import parse_manifest  # noqa: PLC0415

    layers = parse_manifest(manifest.data, manifest.media_type).layers
    if not layers or _BOOTSTRAP_KEY not in layers[-1].annotations:
        raise SignatureError(f"{manifest.digest.short} is no lazy image",
                             hint="sign the lazy image: its manifest is another one than its source's")
    return layers[-1].digest, len(layers) - 1


def _config(source: ImageSource, manifest: Document) -> bytes:
    from lazyfs.image.oci import parse_manifest  # noqa: PLC0415

    config = parse_manifest(manifest.data, manifest.media_type).config
    if config.size > limits.CONFIG_BYTES_MAX:
        raise FormatError(f"{source.name}: a configuration of {config.size} bytes, at most {limits.CONFIG_BYTES_MAX}")
    return source.read_blob(config.digest, config.size)


def _path(cache_dir: Path, layer: Digest) -> Path:
    return cache_dir / "signatures" / f"{layer.hex}.json"


def _read(cache_dir: Path, layer: Digest) -> Evidence | None:
    damaged = (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
    with contextlib.suppress(*damaged), _path(cache_dir, layer).open("rb") as file:
        return shapes.from_json(file.read(_EVIDENCE_BYTES_MAX), Evidence)
    return None


def _write(cache_dir: Path, layer: Digest, evidence: Evidence) -> None:
    """A disk that is full costs the next mount a question to the registry."""
    path = _path(cache_dir, layer)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary.write_bytes(msgspec.json.encode(evidence))
        temporary.replace(path)
        kept = sorted(path.parent.iterdir(), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in kept[_EVIDENCE_COUNT_MAX:]:
            old.unlink(missing_ok=True)
