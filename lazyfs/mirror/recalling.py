"""
Wrong bytes that this node's container runtime was given are taken out of what it has begun to write.

Pieces of peers are passed on before the whole digest is known, so a liar's bytes may be in a client's hands when they
are found wrong. The answer is torn then, but containerd goes on where it was, in this pull and in the next: its
half-done copy keeps what was wrong, and every pull of that image ends with another digest until its garbage collection
happens to come by. So, when the right bytes are here, it is told to drop that copy, before it gets any more of them:
this pull fails, the next one begins anew.

Layer: mirror. Who calls: mirror.download. State: none. containerd's API is reached by what the command line gives (the
layers above know how); other runtimes throw away by themselves what has a wrong digest.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from lazyfs.errors import LazyfsError
from lazyfs.peers.model import Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.image.digest import Digest
    from lazyfs.peers.model import Resource

PATIENCE_S: Final = 10.0         # readers wait for it; the thread that asks is left behind then
_log = logging.getLogger("lazyfs.mirror")


class Recalling:
    """`drop`: blocking; has the runtime drop what it has begun to write of a blob, and says how many copies it had."""

    def __init__(self, drop: Callable[[Digest], int]) -> None:
        self._drop = drop

    async def recall(self, resource: Resource) -> None:
        """Never raises an Exception: who cannot be told is said in the log."""
        if resource.kind is not Kind.BLOB:
            return
        fields = {"fields": {"blob": resource.digest.short}}
        try:
            with trio.fail_after(PATIENCE_S):
                count = await trio.to_thread.run_sync(self._drop, resource.digest, abandon_on_cancel=True)
        except (LazyfsError, trio.TooSlowError) as error:
            _log.warning("containerd may keep wrong bytes of a blob, and pulls of it fail until it drops them: %s",
                         error or "it does not answer", extra=fields)
        else:
            if count:
                _log.warning("containerd has dropped what it had of a blob: there were wrong bytes in it", extra=fields)
