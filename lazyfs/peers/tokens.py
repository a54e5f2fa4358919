"""
Tokens between peers: their form, how one is made, shown and checked.

Layer: peers; no I/O, no state. Who calls: tracker.signing makes them, peers.gate shows and checks them.

A token is a JWT (RFC 7519) that the tracker signs with Ed25519: `iss` ISSUER, `aud` the cluster, `sub` the member,
`res` the resource (or EVERYTHING), `iat`, `exp` at most LIFETIME_S_MAX later, and `cnf` (RFC 7800), the public half of
a key that its holder alone has. What goes over the wire is JWT~PROOF: the holder's signature over the token and the id
of the member it is shown to. So a peer that gets a token cannot show it to another one and take data in its name, as
it could with a bearer token.

Invariants: one algorithm, whatever a header says; a text is at most TOKEN_CHARS_MAX long before anything reads it;
every refusal is a PeerRefusedError of one line, which never holds the token. Clocks may differ by SKEW_S.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import jwt
import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from lazyfs import shapes
from lazyfs.errors import PeerRefusedError
from lazyfs.peers.model import TOKEN_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

ISSUER: Final = "lazyfs-tracker"
EVERYTHING: Final = "*"          # `res` where a cluster has tokens, but none for single resources
LIFETIME_S_MAX = 600.0
SKEW_S = 60.0                    # between machines that keep their time; kubelet's tokens allow as much
KEY_COUNT_MAX = 16               # current and previous ones, of several trackers
KEYS_BYTES_MAX = 16 * 1024
_EPOCH_S_MAX = 1e11              # of a clock that tells the time of day
PUBLIC_KEY_BYTES = 32
_TYPE: Final = "lazyfs-peer+jwt"
_ALGORITHM: Final = "EdDSA"
_SIGNATURE_BYTES = 64
_MEMBER: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KEY_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Claims:
    """
    What a token says.

    Attributes:
        member: whose it is.
        cluster: where it counts.
        key: Resource.key, or EVERYTHING.
        expires: seconds since the epoch.
        holder: the raw public key whose owner may show it.

    """

    member: str
    cluster: str
    key: str
    expires: float
    holder: bytes = field(repr=False)


class NodeKey:
    """The key pair that this process's tokens are bound to. Made anew at each start, never written anywhere."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()

    def show(self, token: str, to: str) -> str:
        """The token as it is shown to the member with id `to`, and to nobody else."""
        return f"{token}~{_encode(self._key.sign(_proof_text(token, to)))}"


    @property
    def name(self) -> str:
        """The public half, as a question for tokens says it."""
        return _encode(self.public)

    def sign_question(self, cluster: str, body: bytes) -> str:
        """What shows a tracker that a question for tokens is this key's holder's."""
        return _encode(self._key.sign(_question_text(cluster, body)))


class SigningKey:
    """One private key of the tracker. `id`: the RFC 7638 thumbprint of its public half."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()
        self.id = key_id(self.public)

    def __repr__(self) -> str:
        return f"SigningKey({self.id})"

    def sign(self, claims: Claims, now: float) -> str:
        """
        A token. `now`: seconds since the epoch.

        It never lasts longer than LIFETIME_S_MAX, whatever `claims` say.
        """
        expires = min(claims.expires, now + LIFETIME_S_MAX)
        payload = {"iss": ISSUER, "aud": claims.cluster, "sub": claims.member, "res": claims.key, "iat": int(now),
                   "exp": int(expires), "cnf": {"jwk": _jwk(claims.holder)}}
        return jwt.encode(payload, self._key, _ALGORITHM, {"kid": self.id, "typ": _TYPE})


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """The trackers' public keys, by key id. `now`: the tracker's clock when it gave them; 0.0: it did not say."""

    by_id: Mapping[str, Ed25519PublicKey] = field(default_factory=dict)
    now: float = field(default=0.0, compare=False)

    def __or__(self, other: PublicKeys) -> PublicKeys:
        return PublicKeys({**self.by_id, **other.by_id}, other.now)


class _Jwk(msgspec.Struct):
    kty: str
    crv: str
    kid: str
    x: str


class _JwkSet(msgspec.Struct, omit_defaults=True):
    keys: list[_Jwk]
    now: Annotated[float, msgspec.Meta(ge=0, le=_EPOCH_S_MAX)] = 0.0


def dump_keys(publics: list[bytes], now: float = 0.0) -> bytes:
    """A JWK Set (RFC 7517, 8037) of raw public keys, and the clock that tokens are signed by."""
    found = [_Jwk("OKP", "Ed25519", key_id(one), _encode(one)) for one in publics]
    return msgspec.json.encode(_JwkSet(found, now))


def parse_keys(data: bytes) -> PublicKeys:
    """
    A JWK Set, from a tracker.

    Raises:
        PeerRefusedError: it is none, or holds a key of another kind, or one under a name that is not its own.

    """
    if len(data) > KEYS_BYTES_MAX:
        raise PeerRefusedError(f"the tracker's keys have {len(data)} bytes, at most {KEYS_BYTES_MAX} are allowed")
    try:
        said = shapes.from_json(data, _JwkSet)
        listed = said.keys
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise PeerRefusedError("the tracker's keys are no JWK Set") from None
    if len(listed) > KEY_COUNT_MAX:
        raise PeerRefusedError(f"the tracker has {len(listed)} keys, at most {KEY_COUNT_MAX} are allowed")
    found = {}
    for one in listed:
        raw = _decode(one.x, PUBLIC_KEY_BYTES)
        if one.kty != "OKP" or one.crv != "Ed25519" or raw is None or one.kid != key_id(raw):
            raise PeerRefusedError("the tracker's keys hold one that is not Ed25519, or under another name")
        found[one.kid] = Ed25519PublicKey.from_public_bytes(raw)
    return PublicKeys(found, said.now)


def key_id(public: bytes) -> str:
    """The RFC 7638 thumbprint of a raw Ed25519 public key."""
    return _encode(hashlib.sha256(msgspec.json.encode(_jwk(public))).digest())


def check_token(shown: str, keys: PublicKeys, cluster: str, *, names: tuple[str, ...], now: float,
                grace_s: float = 0.0) -> Claims:
    """
    What a peer has shown, checked but for the resource: signature, cluster, time, and that it is shown to us.

    Args:
        shown: JWT~PROOF.
        keys: of the trackers that are believed.
        cluster: ours.
        names: by which others may know this node: its member id.
        now: seconds since the epoch.
        grace_s: so long after its end a token still counts (the tracker is lost, nobody can have a new one).

    Raises:
        PeerRefusedError: whatever is wrong with it.

    """
    if len(shown) > TOKEN_CHARS_MAX or not shown.isascii():
        raise PeerRefusedError(f"a token of {len(shown)} characters, at most {TOKEN_CHARS_MAX} of ASCII are allowed")
    token, _, proof = shown.partition("~")
    claims = _claims(_payload(token, keys), cluster, now, grace_s)
    signature = _decode(proof, _SIGNATURE_BYTES)
    if signature is None:
        raise PeerRefusedError("a token without its holder's signature")
    holder = Ed25519PublicKey.from_public_bytes(claims.holder)
    for name in names:
        try:
            holder.verify(signature, _proof_text(token, name))
        except InvalidSignature:
            continue
        return claims
    raise PeerRefusedError("a token that was shown to another member, or by somebody it was not given to")


def is_signed_by(holder: bytes, cluster: str, body: bytes, signature: str) -> bool:
    """Whether a question for tokens is signed by the key with that raw public half."""
    value = _decode(signature, _SIGNATURE_BYTES)
    if value is None:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(holder).verify(value, _question_text(cluster, body))
    except InvalidSignature:
        return False
    return True


def is_member_id(text: str) -> bool:
    """Whether it can be a member's id."""
    return _MEMBER.fullmatch(text) is not None


def _payload(token: str, keys: PublicKeys) -> dict[str, Any]:
    """The payload of a JWT that one of our keys has signed; the header has no say in how that is found out."""
    try:
        header = jwt.get_unverified_header(token)
        name = header.get("kid")
        key = keys.by_id.get(name) if isinstance(name, str) and _KEY_ID.fullmatch(name) else None
        if header.get("typ") != _TYPE or header.get("alg") != _ALGORITHM or key is None:
            raise PeerRefusedError("a token of another kind, or signed with a key that is not our tracker's")
        options = {"verify_signature": True, "verify_exp": False, "verify_iat": False, "verify_nbf": False,
                   "verify_aud": False, "verify_iss": False, "verify_sub": False, "verify_jti": False}
        found = jwt.decode(token, key, algorithms=[_ALGORITHM], options=options)   # type: ignore[arg-type]
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise PeerRefusedError("a token that our tracker has not signed") from None
    return found


def _claims(payload: dict[str, Any], cluster: str, now: float, grace_s: float) -> Claims:
    """Time and addressee; by our own clock and rules, not by the library's."""
    issued, expires = payload.get("iat"), payload.get("exp")
    member, key, confirmation = payload.get("sub"), payload.get("res"), payload.get("cnf")
    if payload.get("iss") != ISSUER or payload.get("aud") != cluster:
        raise PeerRefusedError("a token of another cluster")
    if type(issued) is not int or type(expires) is not int or not 0 < expires - issued <= LIFETIME_S_MAX:
        raise PeerRefusedError("a token whose time is not stated, or longer than it may be")
    if issued > now + SKEW_S:
        raise PeerRefusedError("a token of the future", hint="the clocks of node and tracker differ")
    if expires + SKEW_S + grace_s < now:
        raise PeerRefusedError(f"a token that ended {now - expires:.0f} s ago",
                               hint="the clocks of node and tracker may differ")
    jwk = confirmation.get("jwk") if isinstance(confirmation, dict) else None
    holder = _decode(jwk.get("x"), PUBLIC_KEY_BYTES) if isinstance(jwk, dict) else None
    if not isinstance(member, str) or not is_member_id(member) or not isinstance(key, str) or holder is None:
        raise PeerRefusedError("a token that does not say whose and for what it is")
    return Claims(member, cluster, key, float(expires), holder)


def _proof_text(token: str, to: str) -> bytes:
    return b"lazyfs-peer-1\0" + to.encode() + b"\0" + hashlib.sha256(token.encode()).digest()


def _question_text(cluster: str, body: bytes) -> bytes:
    return b"lazyfs-token-1\0" + cluster.encode() + b"\0" + hashlib.sha256(body).digest()


def _jwk(public: bytes) -> dict[str, str]:
    """In the order that a thumbprint is made of."""
    return {"crv": "Ed25519", "kty": "OKP", "x": _encode(public)}


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: object, size: int) -> bytes | None:
    """Base64url without padding of exactly `size` bytes; None: it is not."""
    if not isinstance(text, str) or len(text) != -(-size * 4 // 3):
        return None
    try:
        data = urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except (ValueError, binascii.Error):
        return None
    return data if len(data) == size and _encode(data) == text else None
