"""
Keys of image signatures: PEM files, ECDSA (P-256, P-384, P-521), Ed25519, RSA.

Layer: lazyfs.image, no I/O. Who calls: lazyfs.node.verifying, lazyfs.cli.sign. The library behind it is imported when
a key is loaded: most commands, and nodes that verify nothing, need none of it. Hashes are those of cosign: SHA-256, or
the one of the curve's size; Ed25519 signs the payload itself; RSA with PKCS #1 v1.5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazyfs.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

RSA_BITS_MIN = 2048
KEY_BYTES_MAX = 64 * 1024
_BLOCK = re.compile(rb"-----BEGIN PUBLIC KEY-----.*?-----END PUBLIC KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PublicKey:
    """One key; `name`: where it is from, for messages."""

    name: str
    key: PublicKeyTypes = field(repr=False)

    def verifies(self, value: bytes, payload: bytes) -> bool:
        """Whether `value` is this key's signature over `payload`."""
        from cryptography.exceptions import InvalidSignature  # noqa: PLC0415
        from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa  # noqa: PLC0415

        try:
            if isinstance(self.key, ed25519.Ed25519PublicKey):
                self.key.verify(value, payload)
                return True
            if isinstance(self.key, rsa.RSAPublicKey):
                self.key.verify(value, payload, padding.PKCS1v15(), hashes.SHA256())
                return True
        except InvalidSignature:
            return False
        assert isinstance(self.key, ec.EllipticCurvePublicKey)
        for one in (hashes.SHA256(), _hash_of(self.key.key_size)):
            try:
                self.key.verify(value, payload, ec.ECDSA(one))
            except InvalidSignature:
                continue
            return True
        return False


def load_public_keys(data: bytes, name: str) -> list[PublicKey]:
    """
    The keys of a PEM file, one or more.

    Raises:
        UsageError: there is none, or one that cannot be read. UnsupportedError: one of a kind we do not verify.

    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_public_key  # noqa: PLC0415

    found = []
    for block in _BLOCK.findall(data[:KEY_BYTES_MAX]):
        try:
            key = load_pem_public_key(block)
        except (ValueError, UnsupportedAlgorithm) as error:
            raise UsageError(f"{name}: not a public key that can be read") from error
        _check_kind(key, name)
        found.append(PublicKey(name, key))
    if not found:
        raise UsageError(f"{name}: holds no public key in PEM form",
                         hint="expected a file as cosign.pub: -----BEGIN PUBLIC KEY-----")
    return found


def sign(private: bytes, password: bytes | None, payload: bytes, name: str) -> tuple[bytes, PublicKey]:
    """
    A signature over `payload`, and the key that verifies it.

    Args:
        private: a private key, PEM (PKCS #8, or the older forms).
        password: that of the key, if it has one.
        payload: what is to be signed.
        name: of the key, for messages.

    Raises:
        UsageError: it cannot be read. UnsupportedError: a kind of key that we do not sign with.

    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415

    if b"ENCRYPTED SIGSTORE" in private or b"ENCRYPTED COSIGN" in private:
        raise UnsupportedError(f"{name}: a private key in cosign's own encryption",
                               hint="sign with cosign, or make a key: openssl genpkey -algorithm ED25519")
    try:
        key = load_pem_private_key(private, password)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{name}: not a private key that can be read with the password given, or without one",
                         hint="a PEM file, as of: openssl genpkey -algorithm ED25519; its password: "
                              "LAZYFS_KEY_PASSWORD") from error
    _check_kind(key.public_key(), name)
    return _sign(key, payload), PublicKey(name, key.public_key())


def _sign(key: PrivateKeyTypes, payload: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa  # noqa: PLC0415

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(payload)
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(payload, padding.PKCS1v15(), hashes.SHA256())
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key.sign(payload, ec.ECDSA(hashes.SHA256()))


def _check_kind(key: object, name: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415

    if isinstance(key, ed25519.Ed25519PublicKey):
        return
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in {"secp256r1", "secp384r1", "secp521r1"}:
        return
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= RSA_BITS_MIN:
        return
    raise UnsupportedError(f"{name}: {type(key).__name__}: expected ECDSA (P-256, P-384, P-521), Ed25519, or RSA of "
                           f"{RSA_BITS_MIN} bits or more")


def _hash_of(bits: int) -> hashes.HashAlgorithm:
    """The hash of a curve's size."""
    from cryptography.hazmat.primitives import hashes  # noqa: PLC0415

    return {384: hashes.SHA384(), 521: hashes.SHA512()}.get(bits, hashes.SHA256())
