"""
The gate of a node: its tokens, got and renewed in time, and others' tokens, checked.

Layer: peers, on trio. Who calls: node and mirror make one; wire client and server ask it (model.Gate); `run` is a task
beside them. State: tokens by resource, answers that were refused, tokens that were admitted, the trackers' public keys.

Invariants: a reader never waits for the tracker but for the first token of a resource, ASK_S at most, and then not
again for FAILED_S or REFUSED_S; a token is renewed RENEW_BEFORE_S before its end; everything kept is bounded. While the
tracker is lost (nothing heard of it for LOST_AFTER_S), tokens count for `grace_s` longer: swarms go on. Nobody can make
a tracker look lost to a node that reaches it. Times of day are compared with tokens only, all else is trio's clock;
they are the tracker's, which it says with its keys: a node whose own clock is wrong takes part all the same.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

import trio

from lazyfs.errors import LazyfsError, PeerRefusedError, SourceError
from lazyfs.peers.tokens import EVERYTHING, LIFETIME_S_MAX, SKEW_S, NodeKey, PublicKeys, check_token

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_log: Final = logging.getLogger("lazyfs.peers")
ASK_S = 3.0                      # for a token: the tracker may have to ask a registry first
RENEW_BEFORE_S = 120.0
RENEW_EVERY_S = 15.0
RENEW_COUNT_MAX = 512            # resources in one question; the layers of an image
FAILED_S = 5.0                   # no tracker: the next reader asks again after that
REFUSED_S = 30.0                 # "you may not": a right that was just given counts that late
KEYS_EVERY_S = 60.0
KEYS_AGAIN_S = 5.0               # after a failure, or a token with a key that is not known
LOST_AFTER_S = 180.0
TOKEN_COUNT_MAX = 8192           # resources of a node: images of 512 layers; the least used goes
ADMITTED_COUNT_MAX = 16_384
SHOWN_COUNT_MAX = 32             # members that one token is shown to: parents of the groups of a resource
UNUSED_S = 3600.0                # a token that nobody used for so long is not renewed
SAY_AGAIN_S = 60.0               # the log says no more often that there is no token, or another's is refused
_REASON_CHARS_MAX = 500


class Authority(Protocol):
    """The trackers, as a gate sees them."""

    async def keys(self) -> PublicKeys:
        """The keys that they sign with. Raises SourceError: none of them answers."""
        ...

    async def issue(self, keys: Sequence[str], holder: NodeKey) -> Mapping[str, tuple[str, float]]:
        """
        Tokens bound to `holder`: by key the text, and for how many seconds it is good; others may come along.

        A key that is not among them: the right is not proved. Raises PeerRefusedError: likewise, for all of them, with
        the reason. SourceError: no tracker, or no registry, answers.
        """
        ...

    async def aclose(self) -> None:
        """Nobody asks any more."""
        ...


@dataclass(slots=True)
class _Held:
    """A token of ours. Times: trio's clock. `shown`: by member, as it is shown to it (a signature: 60 us)."""

    text: str
    ends_at: float
    used_at: float
    shown: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Refusal:
    error: LazyfsError
    until: float


class OpenGate:
    """Where the cluster has no tokens (`tokens = "off"`): everybody who reaches the port is admitted."""

    async def token(self, key: str, to: str) -> str:  # noqa: ARG002
        return ""

    def admit(self, token: str, key: str) -> tuple[str, float]:  # noqa: ARG002
        return "", LIFETIME_S_MAX


@dataclass(slots=True)
class GateCounts:
    """Of tokens: got, not got; others' shown and admitted, refused; of those admitted, by grace only."""

    issued: int = 0
    failed: int = 0
    admitted: int = 0
    refused: int = 0
    by_grace: int = 0


class _Reason:
    """Why something went wrong last: for the operator, and now and then for the log."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._text, self._at = "", 0.0
        self._said_at = float("-inf")

    def note(self, error: LazyfsError) -> None:
        now = trio.current_time()
        self._text, self._at = f"{error}{f' ({error.hint})' if error.hint else ''}"[:_REASON_CHARS_MAX], now
        if now - self._said_at >= SAY_AGAIN_S:
            self._said_at = now
            _log.warning("peers: %s: %s", self._what, self._text)

    def told(self) -> dict[str, str | float]:
        """Empty: nothing went wrong."""
        return {"why": self._text, "seconds_ago": round(trio.current_time() - self._at, 1)} if self._text else {}


@dataclass(eq=False)
class TokenGate:
    """
    A gate with tokens.

    Attributes:
        cluster: ours; tokens of others do not count.
        names: by which peers know this node (its member id).
        authority: the trackers.
        by_resource: False: one token for the whole cluster.
        grace_s: how much longer tokens count while no tracker is heard of; 0: not at all.
        now: seconds since the epoch, by this node's clock.

    """

    cluster: str
    names: tuple[str, ...]
    authority: Authority
    by_resource: bool = True
    grace_s: float = 0.0
    now: Callable[[], float] = time.time
    counts: GateCounts = field(default_factory=GateCounts)
    _key: NodeKey = field(default_factory=NodeKey, repr=False)
    _public: PublicKeys = field(default_factory=PublicKeys, repr=False)
    _held: OrderedDict[str, _Held] = field(default_factory=OrderedDict, repr=False)
    _refusals: OrderedDict[str, _Refusal] = field(default_factory=OrderedDict, repr=False)
    _pending: dict[str, trio.Event] = field(default_factory=dict, repr=False)
    _admitted: OrderedDict[bytes, tuple[str, float]] = field(default_factory=OrderedDict, repr=False)
    _heard_at: float | None = None
    _ahead_s: float = 0.0            # the tracker's clock minus ours
    _own: _Reason = field(default_factory=lambda: _Reason("no token to be had, so nothing comes from peers"))
    _others: _Reason = field(default_factory=lambda: _Reason("a token that was shown is refused"))
    _asked: trio.Event = field(default_factory=trio.Event, repr=False)

    def describe(self) -> dict[str, object]:
        """For `lazyfs peers` and metrics: tokens held, counters since the start, and why it went wrong last."""
        return {"held": len(self._held), "keys": len(self._public.by_id), "lost": self.is_lost,
                **asdict(self.counts), "last_failed": self._own.told(), "last_refused": self._others.told()}

    # --- our own tokens -------------------------------------------------------------------------------------------

    async def token(self, key: str, to: str) -> str:
        """See model.Gate."""
        key = key if self.by_resource else EVERYTHING
        held = self._held.get(key)
        if held is None or trio.current_time() >= held.ends_at + SKEW_S + self._grace_s():
            held = await self._first(key)
        held.used_at = trio.current_time()
        self._held.move_to_end(key)
        if to not in held.shown:
            if len(held.shown) >= SHOWN_COUNT_MAX:
                held.shown.clear()
            held.shown[to] = self._key.show(held.text, to)
        return held.shown[to]

    async def _first(self, key: str) -> _Held:
        """The token of a resource that has none: one task asks, the others wait for its answer."""
        while key in self._pending:
            await self._pending[key].wait()
        held = self._held.get(key)
        if held is not None and trio.current_time() < held.ends_at:
            return held
        refusal = self._refusals.get(key)
        if refusal is not None and trio.current_time() < refusal.until:
            raise type(refusal.error)(str(refusal.error), hint=refusal.error.hint)
        self._pending[key] = trio.Event()
        try:
            return await self._ask(key)
        finally:
            self._pending.pop(key).set()

    async def _ask(self, key: str) -> _Held:
        try:
            with trio.fail_after(ASK_S):
                found = await self.authority.issue([key], self._key)
        except trio.TooSlowError:
            raise self._failed(key, SourceError(f"no token in {ASK_S:g} s: the tracker is late"), FAILED_S) from None
        except PeerRefusedError as error:
            raise self._failed(key, error, REFUSED_S) from None
        except LazyfsError as error:     # of no peer: the one that it was for must not be blamed
            raise self._failed(key, SourceError(f"no token: {error}", hint=error.hint), FAILED_S) from None
        self._keep(found)
        if key not in found:
            raise self._failed(key, PeerRefusedError(f"the tracker gives no token for {key}"), REFUSED_S)
        return self._held[key]

    def _failed(self, key: str, error: LazyfsError, pause_s: float) -> LazyfsError:
        self.counts.failed += 1
        self._own.note(error)
        _put(self._refusals, key, _Refusal(error, trio.current_time() + pause_s), TOKEN_COUNT_MAX)
        return error

    def _keep(self, found: Mapping[str, tuple[str, float]]) -> None:
        now = trio.current_time()
        for key, (text, seconds) in found.items():
            known = self._held.get(key)
            self._refusals.pop(key, None)
            self.counts.issued += 1
            _put(self._held, key, _Held(text, now + min(seconds, LIFETIME_S_MAX), known.used_at if known else now),
                 TOKEN_COUNT_MAX)

    # --- others' tokens -------------------------------------------------------------------------------------------

    def admit(self, token: str, key: str) -> tuple[str, float]:
        """See model.Gate. A signature is checked once (0.6 ms), then known."""
        name = hashlib.sha256(f"{key}\0{token}".encode(errors="replace")).digest()
        known, now = self._admitted.get(name), self.now() + self._ahead_s
        if known is None or now >= known[1] + self._grace_s():
            try:
                known = self._check(token, key, now)
            except PeerRefusedError as error:
                self.counts.refused += 1
                self._others.note(error)
                raise
            _put(self._admitted, name, known, ADMITTED_COUNT_MAX)
        self.counts.admitted += 1
        if now >= known[1]:
            self.counts.by_grace += 1
        return known[0], max(known[1] - now, KEYS_EVERY_S / 2)

    def _check(self, token: str, key: str, now: float) -> tuple[str, float]:
        if not token:
            raise PeerRefusedError("no token was shown", hint="[peers] tokens is not the same on all nodes")
        try:
            claims = check_token(token, self._public, self.cluster, names=self.names, now=now,
                                 grace_s=self._grace_s())
        except PeerRefusedError:
            self._asked.set()    # perhaps the tracker has a new key; asked at most every KEYS_AGAIN_S
            raise
        if claims.key != (key if self.by_resource else EVERYTHING):
            raise PeerRefusedError(f"{claims.member}: a token for something else than {key[:100]}")
        return claims.member, claims.expires

    @property
    def is_lost(self) -> bool:
        """Whether nothing was heard of any tracker for long; not before it was heard of once."""
        return self._heard_at is not None and trio.current_time() - self._heard_at > LOST_AFTER_S

    def _grace_s(self) -> float:
        return self.grace_s if self.is_lost else 0.0

    # --- the task -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep keys and tokens fresh, for ever. Never raises but trio.Cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keys_for_ever)
                nursery.start_soon(self._tokens_for_ever)
        finally:
            with trio.CancelScope(shield=True):
                await self.authority.aclose()

    async def _keys_for_ever(self) -> None:
        was_lost, failed_count = False, 0
        while True:
            failed_count += 1
            pause_s = min(KEYS_AGAIN_S * 2 ** min(failed_count, 8), KEYS_EVERY_S)
            try:
                with trio.fail_after(ASK_S):
                    public = await self.authority.keys()
            except (LazyfsError, trio.TooSlowError) as error:
                _log.debug("peers: no keys of a tracker: %s", error)
            else:
                failed_count, pause_s = 0, KEYS_EVERY_S
                if public != self._public:
                    self._public = public
                    self._admitted.clear()    # a key that was withdrawn admits nobody any more
                self._set_clock(public.now)
                self._heard_at = trio.current_time()
            if self.is_lost != was_lost:
                was_lost = self.is_lost
                _log.warning("peers: no tracker is heard of: tokens count for %g s longer", self.grace_s) if (
                    was_lost) else _log.info("peers: a tracker is heard of again")
            self._asked = trio.Event()
            await trio.sleep(KEYS_AGAIN_S)
            pause_s *= random.uniform(0.9, 1.1)  # noqa: S311 - spreads the nodes
            with trio.move_on_after(pause_s - KEYS_AGAIN_S):
                await self._asked.wait()

    def _set_clock(self, told: float) -> None:
        """`told`: by the tracker, a moment ago; 0.0: nothing."""
        before, self._ahead_s = self._ahead_s, told - self.now() if told else 0.0
        if abs(self._ahead_s) > SKEW_S >= abs(before):
            _log.warning("peers: this node's clock is %.0f s behind the tracker's: tokens are judged by the tracker's",
                         self._ahead_s)

    async def _tokens_for_ever(self) -> None:
        while True:
            await trio.sleep(RENEW_EVERY_S)
            now = trio.current_time()
            for key in [key for key, held in self._held.items() if now - held.used_at > UNUSED_S]:
                del self._held[key]
            due = [key for key, held in self._held.items() if now > held.ends_at - RENEW_BEFORE_S]
            for first in range(0, len(due), RENEW_COUNT_MAX):
                await self._renew(due[first : first + RENEW_COUNT_MAX])

    async def _renew(self, keys: list[str]) -> None:
        """What is not given again is not shown any longer. What could not be asked for is, while others take it."""
        try:
            with trio.fail_after(ASK_S):
                found = await self.authority.issue(keys, self._key)
        except PeerRefusedError:
            found = {}       # perhaps it is used here no longer; whoever wants it yet asks, and is told
        except trio.TooSlowError:
            self.counts.failed += 1
            return
        except LazyfsError as error:
            self.counts.failed += 1
            self._own.note(error)
            return
        self._keep(found)
        for key in keys:
            if key not in found:
                self._held.pop(key, None)


def _put(kept: OrderedDict[_Key, _Value], key: _Key, value: _Value, count_max: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    if len(kept) > count_max:
        kept.popitem(last=False)
