"""What is tried again, and when. Pure. Who calls: fetch.engine."""

from __future__ import annotations

import random

from lazyfs import limits
from lazyfs.errors import LazyfsError, RateLimitedError, SourceError
from lazyfs.fetch.constants import RETRY_AFTER_MAX_S


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
