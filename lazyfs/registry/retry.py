"""
When and how long to wait before trying again.

Layer: registry. The converter's and command line's requests are retried here; `read_range` is not (lazyfs.fetch has its
own schedule and other sources to turn to). Backoff doubles from RETRY_FIRST_S, times uniform(0.5, 1.5) so that clients
which failed together do not come back together; Retry-After is honoured; nothing waits beyond the absolute deadline.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, TypeVar

from lazyfs.errors import IntegrityError, RateLimitedError, SourceError
from lazyfs.limits import RETRY_COUNT_MAX, RETRY_FIRST_S, RETRY_PAUSE_MAX_S

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
_DAMAGE_RETRIES = 1  # a bit flip on the way is rare; a second wrong digest means that the bytes there are wrong


def is_transient(error: BaseException) -> bool:
    return isinstance(error, SourceError) and error.transient


def pause_s(failure_count: int, error: BaseException | None = None) -> float:
    """Seconds to wait after the `failure_count`-th failure in a row (from 1)."""
    grown: float = RETRY_FIRST_S * 2 ** min(failure_count - 1, 30)
    pause = min(grown, RETRY_PAUSE_MAX_S) * random.uniform(0.5, 1.5)  # noqa: S311 - spreads load, guards nothing
    if isinstance(error, RateLimitedError) and error.retry_after_s is not None:
        return max(error.retry_after_s, pause)
    return pause


def wait_or_raise(failure_count: int, error: Exception, deadline: float, retry_count: int = RETRY_COUNT_MAX) -> None:
    """Wait before the next attempt, or raise `error` if there is none: too many failures, or no time left."""
    pause = pause_s(failure_count, error)
    if not is_transient(error) or failure_count > retry_count or time.monotonic() + pause >= deadline:
        raise error
    time.sleep(pause)


def with_retries(operation: Callable[[], T], deadline: float, retry_count: int = RETRY_COUNT_MAX) -> T:
    """
    operation()'s result, tried again after transient errors, and once after bytes with a wrong digest.

    Raises:
        SourceError, IntegrityError: the last attempt's; anything else at once.

    """
    failure_count = damage_count = 0
    while True:
        try:
            return operation()
        except IntegrityError:
            damage_count += 1
            if damage_count > _DAMAGE_RETRIES or time.monotonic() >= deadline:
                raise
        except SourceError as error:
            failure_count += 1
            wait_or_raise(failure_count, error, deadline, retry_count)
