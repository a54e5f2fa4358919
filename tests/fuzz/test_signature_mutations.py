"""Evidence and keys with bits changed: nothing that was changed counts, and nothing but our own errors comes out."""

from __future__ import annotations

import contextlib
import random

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from lazyfs.errors import FormatError, SignatureError, UnsupportedError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.image.keys import load_public_keys, sign
from lazyfs.image.oci import OCI_MANIFEST
from lazyfs.image.signature import build_payload
from lazyfs.node.verifying import Evidence, check_evidence
from tests.fuzz.test_format_mutations import mutate
from tests.unit.test_manifest_lazy import build

PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
SECRET = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
KEYS = load_public_keys(PEM, "a.pub")
MANIFEST = msgspec.json.encode(build()[0])
LAYER = Digest(build()[0]["layers"][-1]["digest"])
PAYLOAD = build_payload(Digest.of(MANIFEST), "registry.example/app")
GOOD = Evidence(PAYLOAD, sign(SECRET, None, PAYLOAD, "a.key")[0], MANIFEST, OCI_MANIFEST)


def test_evidence_that_was_changed_never_counts() -> None:
    """One field at a time; mutations that change nothing are the only ones that pass."""
    assert check_evidence(GOOD, KEYS, LAYER).name == "a.pub"
    rng = random.Random("lazyfs evidence")
    for _ in range(4000):
        name = rng.choice(["payload", "value", "manifest", "index", "config"])
        before = getattr(GOOD, name)
        changed = mutate(rng, before)
        evidence = msgspec.structs.replace(GOOD, **{name: changed})
        try:
            check_evidence(evidence, KEYS, LAYER)
        except (SignatureError, FormatError):
            continue
        assert changed == before or name == "config", (name, changed)   # which is not looked at for this layer


def test_evidence_read_back_from_any_bytes() -> None:
    rng = random.Random("lazyfs evidence file")
    data = msgspec.json.encode(GOOD)
    for _ in range(3000):
        try:
            evidence = msgspec.json.decode(mutate(rng, data), type=Evidence)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
        try:
            check_evidence(evidence, KEYS, LAYER)
        except (SignatureError, FormatError):
            continue
        assert (evidence.payload, evidence.value, evidence.manifest) == (GOOD.payload, GOOD.value, GOOD.manifest)


def test_keys_are_read_or_refused() -> None:
    rng = random.Random("lazyfs keys")
    for _ in range(3000):
        with contextlib.suppress(UsageError, UnsupportedError):
            load_public_keys(mutate(rng, PEM), "x")
        with contextlib.suppress(UsageError, UnsupportedError):
            sign(mutate(rng, SECRET), None, b"payload", "x")
