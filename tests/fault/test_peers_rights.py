"""Who gets a token: whoever may pull the image from its registry, as that registry says itself. Real registries."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
import trio
import trio.testing

from lazyfs.errors import FormatError, LazyfsError, NotFoundError, PeerRefusedError, SourceError
from lazyfs.image.bootstrap import Bootstrap, Device, compress_layer, pack_bootstrap
from lazyfs.image.digest import Digest
from lazyfs.peers.tokens import NodeKey, check_token, parse_keys
from lazyfs.peers.tokenwire import PROOF_QUERY, Proof, TokenAsk, parse_answer
from lazyfs.registry import RegistryOptions, open_destination
from lazyfs.registry.client import RegistryClient
from lazyfs.registry.proving import show_right
from lazyfs.tracker import rights as rights_module
from lazyfs.tracker.issuing import Issuing
from lazyfs.tracker.rights import Rights
from lazyfs.tracker.signing import SigningKeys
from lazyfs.tracker.store import MemoryStore
from lazyfs.tracker.web import Request, Routes
from tests.formatkit import make_bootstrap
from tests.registrykit import Registry, running_registry
from tests.tokenserver import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.tracker.store import Items
    from lazyfs.tracker.web import Answer

pytestmark = pytest.mark.trio
KIM = RegistryOptions(username="kim", password="hunter2-of-kim", retry_count=0)
JOE = RegistryOptions(username="joe", password="hunter2-of-joe", retry_count=0)
ANYBODY = RegistryOptions(retry_count=0)


class Pushed:
    """A bootstrap layer in a repository: `proof` of it without a credential, `keys` of its devices."""

    def __init__(self, host: str, repository: str, bootstrap: Bootstrap, options: RegistryOptions) -> None:
        tar = pack_bootstrap(bootstrap)
        layer = compress_layer(tar)
        self.host, self.repository, self.digest = host, repository, Digest.of(layer)
        self.proof = Proof(f"docker://{host}/{repository}", self.digest.text, len(layer), len(tar))
        self.devices = [device.digest for device in bootstrap.devices]
        if bootstrap.hot is not None:
            self.devices.append(bootstrap.hot.digest)
        self.keys = [f"device/{one}" for one in self.devices]
        destination = open_destination(f"{host}/{repository}:1", options)
        try:
            destination.put_bytes(layer, self.digest)
        finally:
            destination.close()

    def shown_by(self, options: RegistryOptions) -> Proof:
        """The proof with what that user's credential is on the wire."""
        client = RegistryClient(self.host, self.repository, options, through_mirrors=False)
        try:
            secret = show_right(client, self.digest, time.monotonic() + 20)
        finally:
            client.close()
        return msgspec.structs.replace(self.proof, authorization=secret.reveal())


class World:
    """A registry where kim may pull `secret` and both may pull `open`."""

    def __init__(self, tokens: TokenServer, registry: Registry) -> None:
        self.tokens, self.registry, self.host = tokens, registry, registry.host
        self.secret = Pushed(self.host, "team/secret", make_bootstrap([b"s" * 200_704, b"t" * 69_632],
                                                                      hot=[(0, 0, 2)]), KIM)
        self.open = Pushed(self.host, "team/open", make_bootstrap([b"o" * 102_400]), KIM)

    def rights(self, *, items: Items | None = None) -> Rights:
        return Rights([self.host], ANYBODY, items or MemoryStore())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    path = tmp_path_factory.mktemp("rights")
    tokens = TokenServer(path, users={"kim": "hunter2-of-kim", "joe": "hunter2-of-joe"}, anonymous_pull=True,
                         private={"team/secret": {"kim"}})
    with tokens, running_registry(path, **tokens.registry_arguments()) as registry:
        yield World(tokens, registry)


async def granted(rights: Rights, keys: list[str], proof: Proof, holder: bytes = b"h" * 32) -> list[str]:
    return sorted(await rights.granted(keys, proof, holder))


async def test_who_may_pull_an_image_gets_all_of_its_devices(world: World) -> None:
    rights = world.rights()
    assert len(world.secret.keys) == 3               # two layers and the hot part
    assert await granted(rights, world.secret.keys, world.secret.shown_by(KIM)) == sorted(world.secret.keys)
    assert await granted(rights, world.open.keys, world.open.shown_by(ANYBODY)) == world.open.keys


async def test_nobody_else_gets_any(world: World) -> None:
    rights = world.rights()
    await granted(rights, world.secret.keys, world.secret.shown_by(KIM))     # it is known now, and still:
    open_kim, open_joe = world.open.shown_by(KIM), world.open.shown_by(JOE)
    for shown in ("", open_joe.authorization, open_kim.authorization, "Basic am9lOmh1bnRlcjItb2Ytam9l", "Bearer x", "x",
                  "Bearer " + "x" * 20_000):
        proof = msgspec.structs.replace(world.secret.proof, authorization=shown)
        with pytest.raises(LazyfsError):
            await granted(rights, world.secret.keys, proof)
    with pytest.raises(LazyfsError):
        world.secret.shown_by(JOE)                   # the registry does not even show it to him


async def test_a_right_to_one_image_is_none_to_another(world: World) -> None:
    """Devices that are in no bootstrap that was shown; the other repository's name; the other one's bootstrap."""
    rights = world.rights()
    mine = world.open.shown_by(JOE)
    assert await granted(rights, [*world.secret.keys, *world.open.keys], mine) == world.open.keys
    for changed in ({"source": world.secret.proof.source}, {"bootstrap": world.secret.proof.bootstrap}):
        with pytest.raises(PeerRefusedError):
            await granted(rights, world.secret.keys, msgspec.structs.replace(mine, **changed))


async def test_naming_a_device_in_an_own_bootstrap_proves_nothing(world: World) -> None:
    """Its digest is known from logs, say. A bootstrap in a repository of one's own says that it has it."""
    own = make_bootstrap([b"mine" * 51_200])
    forged = Bootstrap(own.blobs, (Device(world.secret.devices[0], own.devices[0].table),), own.erofs)
    image = Pushed(world.host, "joe/forged", forged, JOE)
    rights = world.rights()
    with pytest.raises(FormatError, match="is not the bootstrap"):
        await granted(rights, world.secret.keys[:1], image.shown_by(JOE))
    with pytest.raises(FormatError):                 # and not by having been looked at once
        await granted(rights, world.secret.keys[:1], image.shown_by(JOE))


@pytest.mark.parametrize("changed", [{"size": 0}, {"size": 1 << 40}, {"raw_size": 0}, {"raw_size": 1 << 40},
                                     {"size": 100}, {"raw_size": 100}, {"bootstrap": ""},
                                     {"bootstrap": "sha256:" + "0" * 64}, {"source": "oci:/etc"},
                                     {"source": "docker://a b"}, {"source": "docker://x@y/z"}])
async def test_proofs_that_are_wrong_are_refused_in_bounded_memory(world: World, changed: dict[str, object]) -> None:
    proof = msgspec.structs.replace(world.open.shown_by(KIM), **changed)
    with pytest.raises((PeerRefusedError, FormatError, LazyfsError)) as caught:
        await granted(world.rights(), world.open.keys, proof)
    assert not isinstance(caught.value, SourceError) or isinstance(caught.value, PeerRefusedError | NotFoundError)


async def test_blobs_of_ordinary_images_are_asked_for_one_by_one(world: World) -> None:
    rights = world.rights()
    key = f"blob/{world.secret.digest}"
    assert await granted(rights, [key], world.secret.shown_by(KIM)) == [key]
    for proof in (world.open.shown_by(KIM), msgspec.structs.replace(world.secret.proof, authorization="")):
        with pytest.raises(PeerRefusedError):
            await granted(rights, [key], proof)


async def test_a_password_proves_it_too(tmp_path: Path) -> None:
    with running_registry(tmp_path, username="kim", password="hunter2-of-kim") as registry:
        image = Pushed(registry.host, "app", make_bootstrap([b"p" * 102_400]), KIM)
        rights = Rights([registry.host], ANYBODY, MemoryStore())
        assert await granted(rights, image.keys, image.shown_by(KIM)) == image.keys
        for shown in ("", "Basic a2ltOndyb25n"):
            with pytest.raises(PeerRefusedError):
                await granted(rights, image.keys, msgspec.structs.replace(image.proof, authorization=shown))


async def test_the_registry_is_asked_once_a_minute_for_each_credential(world: World) -> None:
    now = [0.0]
    rights = Rights([world.host], ANYBODY, MemoryStore(), clock=lambda: now[0])
    proof = world.secret.shown_by(KIM)
    for _ in range(5):
        await granted(rights, world.secret.keys, proof)
    assert rights.asked_count == 1
    await granted(rights, world.secret.keys, proof, b"i" * 32)       # it is the credential that may pull
    assert rights.asked_count == 1
    other = world.secret.shown_by(KIM)
    assert other.authorization != proof.authorization
    await granted(rights, world.secret.keys, other)
    assert rights.asked_count == 2
    now[0] += rights_module.PROVED_S + 1
    await granted(rights, world.secret.keys, proof, b"i" * 32)
    assert rights.asked_count == 3


async def test_a_cluster_that_asks_at_once_costs_the_registry_one_question_a_credential(world: World) -> None:
    rights = world.rights()
    good = world.secret.shown_by(KIM)
    bad = msgspec.structs.replace(good, authorization=good.authorization[:-4] + "AAAA")
    outcomes: Counter[tuple[bool, object]] = Counter()

    async def ask(number: int) -> None:
        proof = good if number % 2 else bad
        try:
            found: object = tuple(await granted(rights, world.secret.keys, proof, bytes([number]) * 32))
        except PeerRefusedError as error:
            found = str(error)
        outcomes[proof is good, found] += 1

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, number)
    assert rights.asked_count == 2
    assert outcomes[True, tuple(sorted(world.secret.keys))] == 50
    assert [count for (was_good, _), count in outcomes.items() if not was_good] == [50]
    await granted(rights, world.secret.keys, good, b"x" * 32)
    assert rights.asked_count == 2


async def test_who_waits_for_anothers_question_asks_itself_when_that_one_is_given_up(world: World) -> None:
    rights = world.rights()
    proof = world.secret.shown_by(KIM)
    rights._limit = trio.CapacityLimiter(1)
    await rights._limit.acquire_on_behalf_of(world)
    found: list[list[str]] = []
    given_up = trio.CancelScope()

    async def first() -> None:
        with given_up:
            await granted(rights, world.secret.keys, proof)

    async def second() -> None:
        found.append(await granted(rights, world.secret.keys, proof, b"2" * 32))

    async with trio.open_nursery() as nursery:
        for one in (first, second):
            nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked(0.05)
        given_up.cancel()
        await trio.testing.wait_all_tasks_blocked(0.05)
        rights._limit.release_on_behalf_of(world)
    assert given_up.cancelled_caught
    assert found == [sorted(world.secret.keys)]
    assert rights.asked_count == 1


async def test_the_trackers_own_credentials_are_never_shown(world: World) -> None:
    rights = Rights([world.host], replace(KIM), MemoryStore())
    with pytest.raises(PeerRefusedError):
        await granted(rights, world.secret.keys, world.secret.proof)


async def test_only_listed_registries_are_asked_and_this_machine_only_if_listed(world: World) -> None:
    before = len(world.tokens.requests)
    for listed in ((), ("registry.example",)):
        rights = Rights(listed, ANYBODY, MemoryStore())
        for proof in (world.open.proof, Proof("docker://localhost:1/app", world.open.digest.text, 1, 1)):
            with pytest.raises(PeerRefusedError, match=r"this very machine|does not ask"):
                await granted(rights, world.open.keys, proof)
        assert rights.asked_count == 0
    assert len(world.tokens.requests) == before


async def test_swarms_outlive_an_outage_of_the_registry_for_who_had_the_right(tmp_path: Path) -> None:
    items = MemoryStore()
    with running_registry(tmp_path, username="kim", password="hunter2-of-kim") as registry:
        image = Pushed(registry.host, "app", make_bootstrap([b"p" * 102_400]), KIM)
        proof = image.shown_by(KIM)
        rights = Rights([registry.host], ANYBODY, items)
        assert await granted(rights, image.keys, proof, b"a" * 32) == image.keys
    rights = Rights([image.host], ANYBODY, items)    # and of the tracker as well
    assert await granted(rights, image.keys, proof, b"a" * 32) == image.keys
    with pytest.raises(SourceError):
        await granted(rights, image.keys, proof, b"b" * 32)


async def test_no_credential_is_logged_said_or_kept(world: World, caplog: pytest.LogCaptureFixture) -> None:
    items = MemoryStore()
    rights = world.rights(items=items)
    proof = world.secret.shown_by(KIM)
    with caplog.at_level(logging.DEBUG):
        await granted(rights, world.secret.keys, proof)
        bad = msgspec.structs.replace(proof, authorization=proof.authorization[:-4] + "AAAA")
        with pytest.raises(PeerRefusedError) as caught:
            await granted(rights, world.secret.keys, bad)
    word = proof.authorization.split()[1][:60]
    everything = (repr(proof), repr(rights.__dict__), repr(items.__dict__), repr(items._items), str(caught.value),
                  caught.value.hint, *(record.getMessage() for record in caplog.records))
    assert not any(word in text for text in everything)


# --- the routes ---------------------------------------------------------------------------------------------------


class Asked:
    """The tracker's routes, and a node that asks."""

    def __init__(self, rights: Rights | None, counters: Counter[str]) -> None:
        self.keys = SigningKeys(None)
        self.keys.load()
        self.node = NodeKey()
        self.routes = Routes(lambda _request: None)
        Issuing(self.routes, self.keys, rights, counters)

    async def ask(self, keys: list[str], proof: Proof | None, *, signed_by: NodeKey | None = None,
                  cluster: str = "prod", change: bytes = b"") -> Answer:
        body = msgspec.json.encode(TokenAsk("node-1", self.node.name, keys, proof))
        signature = (signed_by or self.node).sign_question(cluster, body)
        return await self.routes.answer(Request("POST", "/v1/clusters/prod/tokens", PROOF_QUERY + signature, {},
                                                body + change, "::1"))


async def test_what_the_tracker_signs_a_node_believes(world: World) -> None:
    counters: Counter[str] = Counter()
    asked = Asked(world.rights(), counters)
    answer = await asked.ask(world.secret.keys, world.secret.shown_by(KIM))
    assert answer.status == 200
    tokens = parse_answer(answer.body).tokens
    public = parse_keys((await asked.routes.answer(Request("GET", "/v1/keys", "", {}, b"", "::1"))).body)
    for key in world.secret.keys:
        claims = check_token(asked.node.show(tokens[key], "other"), public, "prod", names=("other",), now=time.time())
        assert (claims.member, claims.key) == ("node-1", key)
    assert counters == {"tokens_asked": 1, "tokens_issued": 3}


async def test_a_question_that_its_holder_has_not_signed_is_refused(world: World) -> None:
    asked = Asked(world.rights(), Counter())
    proof = world.secret.shown_by(KIM)
    for answer in (await asked.ask(world.secret.keys, proof, signed_by=NodeKey()),
                   await asked.ask(world.secret.keys, proof, cluster="test"),
                   await asked.ask(world.secret.keys, proof, change=b" ")):
        assert answer.status == 403
        assert proof.authorization.split()[1][:30].encode() not in answer.body


async def test_policies_do_not_mix(world: World) -> None:
    whole, single = Asked(None, Counter()), Asked(world.rights(), Counter())
    assert list(parse_answer((await whole.ask(["*"], None)).body).tokens) == ["*"]
    proof = world.open.shown_by(KIM)
    for answer in (await whole.ask(world.open.keys, proof), await single.ask(["*"], None),
                   await single.ask(["*"], proof), await single.ask(["*", *world.open.keys], proof),
                   await single.ask(world.open.keys, None)):
        assert answer.status == 403


async def test_a_file_is_for_who_knows_its_digest_and_opens_nothing_else(world: World) -> None:
    asked = Asked(world.rights(), Counter())
    key = "file/" + world.secret.digest.text
    assert list(parse_answer((await asked.ask([key], None)).body).tokens) == [key]
    for others in (world.secret.keys, [f"blob/{world.secret.digest}"], ["*"]):
        assert (await asked.ask([key, *others], None)).status == 403
    answer = await asked.ask([key, *world.open.keys], world.open.shown_by(KIM))
    assert list(parse_answer(answer.body).tokens) == world.open.keys


async def test_odd_questions_are_refused_in_one_line(world: World) -> None:
    asked = Asked(world.rights(), Counter())
    await trio.lowlevel.checkpoint()
    for body in (b"", b"{}", b"[" * 10_000, b"\xff", b'{"member":"a","holder":"","keys":[]}',
                 b'{"member":"a b","holder":"","keys":["*"]}', b'{"member":"a","holder":"AA","keys":["*"]}',
                 b'{"member":"a","holder":"\xc3\xa9","keys":["*"]}', b'{"member":"a","holder":"","keys":["../etc"]}',
                 msgspec.json.encode(TokenAsk("a", "", ["*"] * 513))):
        answer = await asked.routes.answer(Request("POST", "/v1/clusters/prod/tokens", "", {}, body, "::1"))
        assert answer.status == 400
        assert answer.body.count(b"\n") == 1
