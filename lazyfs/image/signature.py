"""
Signatures of images, as cosign keeps them beside an image: what is signed, and where it is written down.

    payload    JSON ("simple signing"): critical.image.docker-manifest-digest says what is vouched for
    manifest   an OCI manifest whose layers are payloads; each one's annotation SIGNATURE_KEY is the signature over it
    place      the tag sha256-<hex>.sig, or an artifact of type ARTIFACT_TYPE that refers to the image

Sources: sigstore/cosign specs/SIGNATURE_SPEC.md; containers/image docs/signature-protocols. Everything here comes from
whoever may push to the repository: bounded, FormatError; nothing in it is believed before a key has verified it.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.registry.signatures, lazyfs.node.verifying.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from lazyfs import limits
from lazyfs.errors import FormatError
from lazyfs.image.descriptor import Descriptor, Document
from lazyfs.image.digest import Digest
from lazyfs.image.oci import OCI_MANIFEST, decode_json, encode_json

PAYLOAD_TYPE: Final = "application/vnd.dev.cosign.simplesigning.v1+json"
ARTIFACT_TYPE: Final = "application/vnd.dev.cosign.artifact.sig.v1+json"
SIGNATURE_KEY: Final = "dev.cosignproject.cosign/signature"
CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"
CLAIM: Final = "cosign container image signature"
PAYLOAD_BYTES_MAX: Final = 64 * limits.KIB     # some hundred bytes, and what the signer likes to say besides
SIGNATURE_COUNT_MAX: Final = 64                # of one image: keys of some years
_SIGNATURE_CHARS_MAX: Final = 4096             # base64 of RSA-4096 has 684
_NAME_CHARS_MAX: Final = 1024


@dataclass(frozen=True, slots=True)
class Signature:
    """One signature: `payload` is where the signed bytes are, `value` the signature over them."""

    payload: Descriptor
    value: bytes


class _Layer(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: int
    annotations: dict[str, str] = {}


class _Manifest(msgspec.Struct, rename="camel"):
    schema_version: int
    layers: list[msgspec.Raw]


class _Image(msgspec.Struct):
    digest: str = msgspec.field(name="docker-manifest-digest")


class _Critical(msgspec.Struct):
    image: _Image
    type: str


class _Payload(msgspec.Struct):
    critical: _Critical


def signature_tag(subject: Digest) -> str:
    """The tag under which the signatures of a manifest are."""
    return f"sha256-{subject.hex}.sig"


def parse_signatures(data: bytes) -> list[Signature]:
    """
    The signatures that a manifest names. Entries that are of no use to us are left out: others may be.

    Raises:
        FormatError: it is no manifest.

    """
    found = []
    for raw in decode_json(data, _Manifest, "signatures").layers[:SIGNATURE_COUNT_MAX]:
        try:
            layer = decode_json(bytes(raw), _Layer, "signature")
            text = layer.annotations.get(SIGNATURE_KEY, "")
            if layer.media_type == PAYLOAD_TYPE and 0 < layer.size <= PAYLOAD_BYTES_MAX and (
                    0 < len(text) <= _SIGNATURE_CHARS_MAX):
                value = base64.b64decode(text, validate=True)
                found.append(Signature(Descriptor(PAYLOAD_TYPE, Digest(layer.digest), layer.size), value))
        except (FormatError, binascii.Error, ValueError):
            continue
    return found


def parse_payload(data: bytes) -> Digest:
    """
    The manifest that a payload vouches for. To be called with bytes whose signature is right.

    Raises:
        FormatError: it is no such claim.

    """
    critical = decode_json(data, _Payload, "signed payload").critical
    if critical.type != CLAIM:
        raise FormatError(f"signed payload: a claim of type {critical.type!r:.80}, expected {CLAIM!r}")
    return Digest(critical.image.digest)


def build_payload(subject: Digest, name: str) -> bytes:
    """What is to be signed: that `subject` is an image of the repository `name`."""
    return encode_json({
        "critical": {"identity": {"docker-reference": name[:_NAME_CHARS_MAX]},
                     "image": {"docker-manifest-digest": subject.text}, "type": CLAIM},
        "optional": None,
    })


def add_signature(known: bytes | None, payload: bytes, value: bytes) -> tuple[Document, bytes]:
    """
    The manifest of the signatures, with one more.

    Args:
        known: the manifest so far; None: there is none.
        payload: the signed bytes.
        value: the signature.

    Returns:
        The manifest and its config; both, and the payload, are to be stored.

    Raises:
        FormatError: what is there is no manifest, or holds too many.

    """
    raws = [] if known is None else decode_json(known, _Manifest, "signatures").layers
    for raw in raws:
        Digest(decode_json(bytes(raw), _Layer, "signature").digest)
    layers: list[Any] = [msgspec.json.decode(bytes(raw)) for raw in raws]
    if len(layers) >= SIGNATURE_COUNT_MAX:
        raise FormatError(f"{len(layers)} signatures are there already, at most {SIGNATURE_COUNT_MAX} are looked at",
                          hint="remove the tag ...sig, and sign again")
    layers.append({"mediaType": PAYLOAD_TYPE, "digest": Digest.of(payload).text, "size": len(payload),
                   "annotations": {SIGNATURE_KEY: base64.b64encode(value).decode()}})
    config = encode_json({
        "architecture": "", "os": "", "created": "0001-01-01T00:00:00Z", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
    })
    data = encode_json({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {"mediaType": CONFIG_TYPE, "digest": Digest.of(config).text, "size": len(config)},
        "layers": layers,
    })
    return Document(data, OCI_MANIFEST, Digest.of(data)), config
