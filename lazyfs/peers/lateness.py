"""
When to look at a request that is under way, and what its lateness says of who was asked: slow, or gone.

Late, by what is usual, and silent are two things. Who waits for its own parent says so (model.BEAT_S), and is late
because the origin is, or the network is full: asking others makes that worse, so it has a price (pace). Of whom not a
byte has come over any connection, it is gone: frozen, or its machine is. It is then left like one that broke off, long
before SILENCE_S.

Layer: peers. Who calls: swarmfetch. Pure; times are trio's clock.
"""

from __future__ import annotations

import enum
import math
from typing import TYPE_CHECKING, Final

from lazyfs.peers.health import SLOW_MIN_S, SLOW_TIMES
from lazyfs.peers.model import Priority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lazyfs.peers.swarm import Swarm
    from lazyfs.peers.ways import Attempt

HERE_TIMES: Final = 4            # of the pace's delay: who has it needs no longer
ALIVE_TIMES: Final = 2           # of it: who brings other pieces may take so long for this one
# Seconds without a byte. Two beats or more are missing by then (model.BEAT_READ_S, BEAT_S).
SUSPECT_READ_S: Final = 0.4      # of who was asked for a read: another one is asked as well
GONE_READ_S: Final = 0.6         # and it is left; a root's work is the next one's in the order
GONE_S: Final = 1.0              # of who was asked for anything else: a busy machine is no dead one
SUSPECT_AGAIN_S: Final = 0.15    # of who was gone before and has brought nothing since
DEAF_S: Final = 0.1              # this loop itself was late by so much: what came meanwhile has not been taken yet


class Quiet(enum.IntEnum):
    """What silence says of a member. NO: nothing. SUSPECT: ask others as well. GONE: leave it."""

    NO = 0
    SUSPECT = 1
    GONE = 2


def quiet(swarm: Swarm, attempt: Attempt, now: float) -> Quiet:
    """Of who was asked, as seen from that request."""
    if attempt.ours:
        return Quiet.NO
    silent_s = now - _heard_at(swarm, attempt)
    suspect_s, gone_s = _bounds(swarm, attempt)
    return Quiet.GONE if silent_s >= gone_s else Quiet.SUSPECT if silent_s >= suspect_s else Quiet.NO


def root_gone_at(swarm: Swarm, attempts: Iterable[Attempt]) -> float:
    """When a read no longer waits for those that were asked for it, none of whom is heard; inf: nobody was asked."""
    return max((math.inf if one.ours else _heard_at(swarm, one) + GONE_READ_S for one in attempts), default=math.inf)


def judge(swarm: Swarm, attempt: Attempt, seconds: float, now: float, *, came: bool) -> None:
    """
    Is it slow, beside the others? `came`: a piece has, after so long; else nothing yet.

    Who brings half of everything is what is usual: with one other node, a queue that grows is not its fault.
    """
    health, usual = swarm.health.of(attempt.member.id), swarm.pace.median_s(attempt.priority)
    if 2 * health.pieces > swarm.counters["pieces"]:
        return
    times = seconds / max(usual, SLOW_MIN_S)
    if came:
        health.times_usual.append(times)
    elif usual and times > SLOW_TIMES and not attempt.late:
        attempt.late = True
        health.late += 1
    if health.is_mostly_late():
        swarm.health.was_slow(attempt.member.id, now, f"{seconds:.2f} s a piece, others {usual:.2f} s")


def due_at(swarm: Swarm, attempt: Attempt) -> float:
    """When to look at it. Of what nobody sleeps on: not while the same peer brings other pieces."""
    if attempt.ours:
        return math.inf
    health = swarm.health.of(attempt.member.id)
    if is_left(swarm, attempt):
        return attempt.moved_at
    heard_at = _heard_at(swarm, attempt)
    quiet_at = min((heard_at + bound for bound in _bounds(swarm, attempt) if heard_at + bound > attempt.looked_at),
                   default=math.inf)
    since = max(attempt.moved_at, attempt.looked_at)
    delay = swarm.pace.delay_s(attempt.priority) * attempt.patience
    if attempt.here_only:
        late_at = since + HERE_TIMES * delay
    elif attempt.priority is Priority.FOREGROUND:
        late_at = since + delay
    else:
        late_at = max(since + delay, min(health.moved_at + delay, attempt.moved_at + ALIVE_TIMES * delay))
    return min(quiet_at, late_at)


def is_left(swarm: Swarm, attempt: Attempt) -> bool:
    """
    Slow, and not waited for: it says so itself, or all that it was asked for can be had elsewhere.

    Who was only found slow may be the one that has it, and that all others ask.
    """
    return swarm.is_slow(attempt.member) and (swarm.says_slow(attempt.member) or (not attempt.here_only and all(
        attempt.ways[index].next < len(attempt.ways[index].stops) for index in attempt.left)))


def _heard_at(swarm: Swarm, attempt: Attempt) -> float:
    """From when on it is silent, if it is."""
    return max(swarm.exchange.heard_at(attempt.member), attempt.moved_at, swarm.deaf_at)


def _bounds(swarm: Swarm, attempt: Attempt) -> tuple[float, float]:
    suspect_s, gone_s = (SUSPECT_READ_S, GONE_READ_S) if attempt.priority is Priority.FOREGROUND else (GONE_S, GONE_S)
    return SUSPECT_AGAIN_S if swarm.health.of(attempt.member.id).gone_in_a_row else suspect_s, gone_s
