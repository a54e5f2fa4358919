"""Keys and signatures of images: those of openssl are understood, what is malformed is of no use and breaks nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import FormatError, SignatureError, UnsupportedError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.image.keys import load_public_keys, sign
from lazyfs.image.signature import (
    PAYLOAD_BYTES_MAX,
    PAYLOAD_TYPE,
    SIGNATURE_COUNT_MAX,
    SIGNATURE_KEY,
    add_signature,
    build_payload,
    parse_payload,
    parse_signatures,
    signature_tag,
)
from lazyfs.node.verifying import Evidence, check_evidence
from tests.keykit import KINDS, make_key, openssl

if TYPE_CHECKING:
    from pathlib import Path

SUBJECT = Digest.of(b"an image")


@pytest.mark.parametrize("kind", KINDS)
def test_openssl_and_we_verify_each_other(tmp_path: Path, kind: str) -> None:
    private, public = make_key(tmp_path, kind)
    payload, value = tmp_path / "payload", tmp_path / "value"
    payload.write_bytes(build_payload(SUBJECT, "registry.example/app"))
    (key,) = load_public_keys(public.read_bytes(), "a.pub")
    ours, _ = sign(private.read_bytes(), None, payload.read_bytes(), "a.key")
    assert key.verifies(ours, payload.read_bytes())
    assert not key.verifies(ours, payload.read_bytes() + b" ")
    assert not key.verifies(ours[:-1], payload.read_bytes())
    assert not key.verifies(b"", payload.read_bytes())
    if kind == "ed25519":
        openssl("pkeyutl", "-sign", "-inkey", private, "-rawin", "-in", payload, "-out", value)
    else:
        openssl("dgst", "-sha256", "-sign", private, "-out", value, payload)
    assert key.verifies(value.read_bytes(), payload.read_bytes())
    value.write_bytes(ours)
    if kind == "ed25519":
        openssl("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", payload, "-sigfile", value)
    else:
        openssl("dgst", "-sha256", "-verify", public, "-signature", value, payload)


def test_a_file_may_hold_several_keys_and_a_password(tmp_path: Path) -> None:
    both = b"".join(make_key(tmp_path, kind)[1].read_bytes() for kind in ("p256", "ed25519"))
    assert len(load_public_keys(b"# two of them\n" + both, "both.pub")) == 2
    openssl("pkcs8", "-topk8", "-in", tmp_path / "p256.key", "-out", tmp_path / "locked.key", "-passout", "pass:x")
    locked = (tmp_path / "locked.key").read_bytes()
    assert sign(locked, b"x", b"payload", "locked")[1].verifies(sign(locked, b"x", b"payload", "locked")[0], b"payload")
    for password in (None, b"y"):
        with pytest.raises(UsageError, match="with the password given"):
            sign(locked, password, b"payload", "locked")


def test_what_is_no_key_is_said(tmp_path: Path) -> None:
    for data in (b"", b"ssh-ed25519 AAAA", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"):
        with pytest.raises(UsageError, match=r"x\.pub"):
            load_public_keys(data, "x.pub")
    openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:1024", "-out", tmp_path / "weak.key")
    openssl("pkey", "-in", tmp_path / "weak.key", "-pubout", "-out", tmp_path / "weak.pub")
    with pytest.raises(UnsupportedError, match="2048"):
        load_public_keys((tmp_path / "weak.pub").read_bytes(), "weak.pub")
    with pytest.raises(UnsupportedError, match="own encryption"):
        sign(b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----", None, b"", "cosign.key")


def test_a_manifest_of_signatures_keeps_the_others() -> None:
    assert signature_tag(SUBJECT) == f"sha256-{SUBJECT.hex}.sig"
    payload = build_payload(SUBJECT, "x/y")
    assert parse_payload(payload) == SUBJECT
    first, _ = add_signature(None, payload, b"one")
    second, config = add_signature(first.data, payload, b"two")
    assert [one.value for one in parse_signatures(second.data)] == [b"one", b"two"]
    assert json.loads(second.data)["config"]["digest"] == Digest.of(config).text
    full = first
    for number in range(SIGNATURE_COUNT_MAX - 1):
        full, _ = add_signature(full.data, payload, bytes([number]))
    with pytest.raises(FormatError, match="at most"):
        add_signature(full.data, payload, b"more")


def layer(**changes: object) -> dict[str, object]:
    good: dict[str, object] = {"mediaType": PAYLOAD_TYPE, "digest": SUBJECT.text, "size": 10,
                               "annotations": {SIGNATURE_KEY: "b25l"}}
    return {**good, **changes}


def test_entries_of_no_use_do_not_hide_the_others() -> None:
    useless = [
        layer(mediaType="text/plain"), layer(digest="sha256:short"), layer(size=PAYLOAD_BYTES_MAX + 1), layer(size=-1),
        layer(size=2**80), layer(annotations={}), layer(annotations={SIGNATURE_KEY: "!!"}), layer(annotations=7),
        layer(annotations={SIGNATURE_KEY: "A" * 5000}), {}, 3, None, "x",
    ]
    data = json.dumps({"schemaVersion": 2, "layers": [*useless, layer()]}).encode()
    assert [one.value for one in parse_signatures(data)] == [b"one"]
    for bad in (b"", b"[]", b'{"schemaVersion": 2}', b"[" * 10_000, b'{"schemaVersion": 2, "layers": 1}'):
        with pytest.raises(FormatError):
            parse_signatures(bad)


@pytest.mark.parametrize("payload", [
    b"", b"{}", b'{"critical": {}}', b"\xff", b"[" * 10_000, b'{"critical": {"image": {}, "type": "x"}}',
    json.dumps({"critical": {"image": {"docker-manifest-digest": "x"}, "type": "cosign container image signature"}}),
    json.dumps({"critical": {"image": {"docker-manifest-digest": SUBJECT.text}, "type": "another claim"}}),
])
def test_only_a_claim_about_an_image_is_one(payload: str | bytes) -> None:
    with pytest.raises(FormatError):
        parse_payload(payload.encode() if isinstance(payload, str) else payload)


def test_what_is_signed_must_be_what_is_mounted(tmp_path: Path) -> None:
    private, public = make_key(tmp_path, "ed25519")
    keys = load_public_keys(public.read_bytes(), "a.pub")
    blob, other = Digest.of(b"blob"), Digest.of(b"other")

    def evidence(bootstrap: Digest, claimed: bytes | None = None, *, lazy: bool = True) -> Evidence:
        annotations = {"containerd.io/snapshot/lazyfs.bootstrap": "1"} if lazy else {}
        manifest = json.dumps({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": blob.text, "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": bootstrap.text, "size": 3,
                        "annotations": annotations}]}).encode()
        payload = build_payload(Digest.of(manifest if claimed is None else claimed), "x")
        value, _ = sign(private.read_bytes(), None, payload, "a.key")
        return Evidence(payload, value, manifest, "application/vnd.oci.image.manifest.v1+json")

    assert check_evidence(evidence(blob), keys, blob).name == "a.pub"
    for bad, reason in [(evidence(other), "another bootstrap"), (evidence(blob, b"another"), "for another image"),
                        (evidence(blob, lazy=False), "no lazy image")]:
        with pytest.raises(SignatureError, match=reason):
            check_evidence(bad, keys, blob)
    with pytest.raises(SignatureError, match="none of the keys"):
        check_evidence(evidence(blob), [], blob)
