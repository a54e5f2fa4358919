"""What is tried again, and when. Pure, but for the time. Who calls: fetch.scheduler, fetch.sources."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import BugError, CacheError, DeadlineError, LazyfsError, RateLimitedError, ResourceError, SourceError
from lazyfs.fetch.constants import BAD_CHUNK_TRY_COUNT, RETRY_AFTER_MAX_S

if TYPE_CHECKING:
    from lazyfs.fetch.flight import Flight
    from lazyfs.fetch.transfer import Transfer


def is_transient(error: LazyfsError) -> bool:
    """Whether another attempt at the same source may help."""
    return isinstance(error, SourceError) and error.transient


def pause_s(error: LazyfsError, attempt_count: int) -> float:
    """
    How long to wait before the next attempt: doubling with jitter, or what the source asked for, within bounds.

    Args:
        error: of the last attempt.
        attempt_count: attempts made so far, at least 1.

    """
    if isinstance(error, RateLimitedError) and error.retry_after_s is not None:
        # A little later than asked, each at another time: not all nodes at the same moment.
        return min(error.retry_after_s, RETRY_AFTER_MAX_S) + random.uniform(0, limits.RETRY_FIRST_S)    # noqa: S311
    pause = limits.RETRY_FIRST_S * 2.0 ** (attempt_count - 1)
    return float(min(pause * random.uniform(0.5, 1.5), limits.RETRY_PAUSE_MAX_S))    # noqa: S311


def says_nothing(error: LazyfsError) -> bool:
    """Whether it says nothing of the source as a whole: this machine's limits, disk, or bug; one mirror of several."""
    return isinstance(error, ResourceError | CacheError | BugError) or getattr(error, "elsewhere", False)


def verdict(flight: Flight, transfer: Transfer, *, down: bool) -> tuple[bool, LazyfsError]:
    """
    Of a flight that did not land: whether it is to be tried again, and what was wrong. Counts the attempt.

    Args:
        flight: of the transfer.
        transfer: that is over.
        down: whether its source is taken to be out of order as a whole: then the attempt is not the flight's.

    """
    if flight.bad is not None:
        error, flight.bad = flight.bad, None
        flight.bad_count += 1
        again = flight.bad_count < BAD_CHUNK_TRY_COUNT
    else:
        error = transfer.error or BugError(f"{flight.source.name}: chunk {flight.index} was left out")
        if not (transfer.landed_count or down or says_nothing(error)):
            flight.attempt_count += 1
        again = is_transient(error) and flight.attempt_count < limits.RETRY_COUNT_MAX
        pause = 0.0 if down else pause_s(error, max(1, flight.attempt_count))
        if again and time.monotonic() + pause >= flight.deadline:
            again = False
            if not isinstance(error, RateLimitedError):    # which is the source's own word
                error = DeadlineError(f"{flight.source.name}: no time for another try: {error}")
    flight.last_error = error
    return again, error
