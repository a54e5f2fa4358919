"""Tokens between peers: what is refused, and that nothing but the right one is not. No I/O."""

from __future__ import annotations

import base64
import json
import random

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed448
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from lazyfs.errors import PeerRefusedError
from lazyfs.peers.model import TOKEN_CHARS_MAX
from lazyfs.peers.tokens import (
    KEY_COUNT_MAX,
    LIFETIME_S_MAX,
    SKEW_S,
    Claims,
    NodeKey,
    SigningKey,
    check_token,
    dump_keys,
    key_id,
    parse_keys,
)

NOW = 1_900_000_000.0
RESOURCE = "device/sha256:" + "a" * 64
TRACKER = SigningKey(Ed25519PrivateKey.generate())
NODE = NodeKey()
KEYS = parse_keys(dump_keys([TRACKER.public]))


def claims(**changed: object) -> Claims:
    base = {"member": "node-1", "cluster": "prod", "key": RESOURCE, "expires": NOW + 600, "holder": NODE.public}
    return Claims(**{**base, **changed})


def check(shown: str, *, now: float = NOW, cluster: str = "prod", name: str = "node-2", grace_s: float = 0.0) -> Claims:
    return check_token(shown, KEYS, cluster, names=(name,), now=now, grace_s=grace_s)


def test_a_token_says_what_was_put_in_and_is_short() -> None:
    shown = NODE.show(TRACKER.sign(claims(), NOW), "node-2")
    assert check(shown) == claims()
    assert len(shown) < TOKEN_CHARS_MAX / 2


def test_it_counts_in_its_time_and_clocks_may_differ_a_little() -> None:
    shown = NODE.show(TRACKER.sign(claims(), NOW), "node-2")
    check(shown, now=NOW - SKEW_S)
    check(shown, now=NOW + 600 + SKEW_S)
    check(shown, now=NOW + 600 + SKEW_S + 1000, grace_s=1000)
    for now, grace_s in ((NOW - SKEW_S - 1, 0), (NOW + 601 + SKEW_S, 0), (NOW + 1601 + SKEW_S, 1000)):
        with pytest.raises(PeerRefusedError, match=r"future|ended"):
            check(shown, now=now, grace_s=grace_s)


def test_nobody_can_make_one_that_lasts_longer_than_ten_minutes() -> None:
    shown = NODE.show(TRACKER.sign(claims(expires=NOW + 1e9), NOW), "node-2")
    assert check(shown).expires == NOW + LIFETIME_S_MAX
    long = jwt.encode({**_payload(), "exp": int(NOW + 601)}, TRACKER._key, "EdDSA", _header())
    with pytest.raises(PeerRefusedError, match="longer"):
        check(NODE.show(long, "node-2"))


def test_of_another_cluster_it_is_worth_nothing() -> None:
    with pytest.raises(PeerRefusedError, match="another cluster"):
        check(NODE.show(TRACKER.sign(claims(cluster="test"), NOW), "node-2"))
    for audience in (["prod", "test"], None, "", 5, {"prod": 1}):
        text = jwt.encode({**_payload(), "aud": audience}, TRACKER._key, "EdDSA", _header())
        with pytest.raises(PeerRefusedError):
            check(NODE.show(text, "node-2"))


def test_a_peer_that_was_shown_one_cannot_show_it_further() -> None:
    token = TRACKER.sign(claims(), NOW)
    shown = NODE.show(token, "thief")
    check(shown, name="thief")
    for stolen in (shown, NodeKey().show(token, "node-2"), token, token + "~", token + "~" + "A" * 86):
        with pytest.raises(PeerRefusedError):
            check(stolen)


def test_another_trackers_key_does_not_count() -> None:
    other = SigningKey(Ed25519PrivateKey.generate())
    with pytest.raises(PeerRefusedError, match="not our tracker"):
        check(NODE.show(other.sign(claims(), NOW), "node-2"))
    # nor under the name of the right one
    text = jwt.encode(_payload(), other._key, "EdDSA", _header())
    with pytest.raises(PeerRefusedError, match="not signed"):
        check(NODE.show(text, "node-2"))


def _payload() -> dict[str, object]:
    public = base64.urlsafe_b64encode(NODE.public).rstrip(b"=").decode()
    return {"iss": "lazyfs-tracker", "aud": "prod", "sub": "node-1", "res": RESOURCE, "iat": int(NOW),
            "exp": int(NOW + 600), "cnf": {"jwk": {"kty": "OKP", "crv": "Ed25519", "x": public}}}


def _header(**changed: object) -> dict[str, object]:
    return {"kid": TRACKER.id, "typ": "lazyfs-peer+jwt", **changed}


def test_the_header_cannot_choose_the_algorithm() -> None:
    """None, HMAC with the public key as the secret, other curves, keys that it brings along."""
    def segment(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    unsigned = f"{segment(_header(alg='none'))}.{segment(_payload())}."
    hmac = jwt.encode(_payload(), TRACKER.public, "HS256", _header())
    curve = jwt.encode(_payload(), ec.generate_private_key(ec.SECP256R1()), "ES256", _header())
    longer = jwt.encode(_payload(), ed448.Ed448PrivateKey.generate(), "EdDSA", _header())
    own = Ed25519PrivateKey.generate()
    public = base64.urlsafe_b64encode(own.public_key().public_bytes_raw()).decode()
    brought = jwt.encode(_payload(), own, "EdDSA", _header(
        jwk={"kty": "OKP", "crv": "Ed25519", "x": public},
        jku="http://127.0.0.1/keys", x5u="http://127.0.0.1/cert"))
    good = jwt.encode(_payload(), TRACKER._key, "EdDSA", _header())
    check(NODE.show(good, "node-2"))
    renamed = good.split(".")
    for text in (unsigned, hmac, curve, longer, brought,
                 f"{segment(_header(alg='none'))}.{renamed[1]}.{renamed[2]}",
                 f"{segment(_header(alg='EdDSA', crit=['b64'], b64=False))}.{renamed[1]}.{renamed[2]}",
                 jwt.encode(_payload(), TRACKER._key, "EdDSA", _header(typ="JWT")),
                 jwt.encode(_payload(), TRACKER._key, "EdDSA", {"typ": "lazyfs-peer+jwt"}),
                 jwt.encode(_payload(), TRACKER._key, "EdDSA", _header(kid="../../etc/passwd"))):
        with pytest.raises(PeerRefusedError):
            check(NODE.show(text, "node-2"))


@pytest.mark.parametrize("changed", [
    {"sub": ""}, {"sub": "a b"}, {"sub": "x" * 129}, {"sub": 7}, {"sub": "a\n"}, {"res": 7}, {"res": None},
    {"iss": "somebody"},
    {"iat": "1"}, {"iat": None}, {"iat": True}, {"exp": 1.5}, {"exp": int(NOW) - 1}, {"exp": None}, {"exp": 1 << 70},
    {"cnf": None}, {"cnf": {"jwk": None}}, {"cnf": {"jwk": {"x": "AAAA"}}}, {"cnf": {"jwk": {"x": 5}}}, {"cnf": []},
])
def test_claims_that_are_missing_or_odd_are_refused(changed: dict[str, object]) -> None:
    text = jwt.encode({**_payload(), **changed}, TRACKER._key, "EdDSA", _header())
    with pytest.raises(PeerRefusedError):
        check(NODE.show(text, "node-2"))


def test_nothing_is_read_of_what_is_too_long_or_no_text() -> None:
    good = NODE.show(TRACKER.sign(claims(), NOW), "node-2")
    for text in ("", "~", ".", "..", "...~", "a.b.c~d", good + " ", "x" * (TOKEN_CHARS_MAX + 1), "é" * 100, "\x00" * 50,
                 good.replace(".", "..", 1), "~" + good):
        with pytest.raises(PeerRefusedError):
            check(text)


def test_any_character_changed_is_noticed() -> None:
    good = NODE.show(TRACKER.sign(claims(), NOW), "node-2")
    randomly = random.Random(7)
    for position in randomly.sample(range(len(good)), 150):
        other = randomly.choice([one for one in "ABCabc012_-.~" if one != good[position]])
        with pytest.raises(PeerRefusedError):
            check(good[:position] + other + good[position + 1 :])


def test_a_refusal_holds_nothing_of_the_token() -> None:
    good = NODE.show(TRACKER.sign(claims(), NOW), "thief")
    with pytest.raises(PeerRefusedError) as caught:
        check(good)
    assert not any(part in str(caught.value) for part in good.replace("~", ".").split("."))
    assert "holder=" not in repr(claims())
    assert repr(TRACKER) == f"SigningKey({TRACKER.id})"


def test_keys_of_a_tracker_are_read_or_refused() -> None:
    publics = [Ed25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(KEY_COUNT_MAX + 1)]
    assert set(parse_keys(dump_keys(publics[:3])).by_id) == {key_id(one) for one in publics[:3]}
    listed = msgspec.json.decode(dump_keys(publics[:1]))["keys"][0]
    for data in (b"", b"[]", b"{}", b'{"keys":5}', b'{"keys":[{}]}', b"x" * 20_000, dump_keys(publics), b"[" * 5000,
                 b"\xff", *(json.dumps({"keys": [{**listed, **changed}]}).encode() for changed in (
                     {"kid": "other"}, {"kty": "RSA"}, {"crv": "Ed448"}, {"x": "AAAA"}, {"x": listed["x"] + "="}))):
        with pytest.raises(PeerRefusedError):
            parse_keys(data)


def test_the_id_of_a_key_is_its_thumbprint() -> None:
    """RFC 8037, appendix A.3."""
    text = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
    assert key_id(base64.urlsafe_b64decode(text + "=")) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
