"""
Credentials handed to a worker over its control socket: the operation `credentials`.

The snapshotter sees what kubelet pulls with and hands it over, to each new worker again. A mark in the run directory
(no secret in it) says that somebody does: a worker that finds it waits a moment for them, where a registry demands
credentials, instead of failing a read that the worker before it would have served.

Layer: node. Who calls: node.worker makes it, node.control calls it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from lazyfs.errors import UsageError
from lazyfs.registry.pushed import PUSHED

if TYPE_CHECKING:
    from pathlib import Path

WAIT_S = 5.0     # the giver sees within a second that the worker is another one


class HandedCredentials:
    """See the module. `mark`: a file that need not exist."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark
        if mark.exists():
            PUSHED.expect(WAIT_S)

    def take(self, entries: object, *, more: bool = False) -> dict[str, Any]:
        """
        Keep them in memory; an empty list says that there are none.

        Args:
            entries: a list of {host, repository, username, password | identity_token, lifetime_s}, the newest last.
            more: the rest comes with the next request.

        Returns:
            `known`: how many there are; `used`: [host, repository] of those used since the last time.

        Raises:
            UsageError: malformed; none was taken, and nothing of them is shown.

        """
        if not isinstance(entries, list):
            raise UsageError("malformed credentials: expected a list")
        PUSHED.put(entries, more=more)
        if entries:
            with contextlib.suppress(OSError):   # the next worker then does not wait
                self._mark.touch(0o600)
        return {"known": len(PUSHED), "used": PUSHED.take_used()}
