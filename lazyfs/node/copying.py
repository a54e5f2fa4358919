"""
Everything that makes images whole in the cache, as the worker has it: the copy in the background, and what was asked
for by `lazyfs cache fetch`; and their control requests.

Layer: node. Who calls: node.worker, which runs it; node.control passes on PIN, FETCH and COPIES:

    {"op": "pin", "name": ..., "pinned": true|false}                    node.pinning.set_pin()
    {"op": "fetch", "order": ..., "rate": bytes/s, "pin": bool}         -> the fetch, as COPIES has it; it goes on
    {"op": "fetch", "image": ..., "stop": true}                         -> {"stopped": bool}
    {"op": "copies"}                                                    -> {"copies": [...], "fetches": [...], ...}

Of `copies`, one a mounted image: image, bootstrap, target, and what FullCopies.describe() says; of `fetches`: see
Fetch.describe().
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from lazyfs.errors import UsageError
from lazyfs.node import protocol
from lazyfs.node.fetching import Fetching
from lazyfs.node.fullcopy import FullCopies
from lazyfs.node.order import MountOrder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from lazyfs import config
    from lazyfs.cache.store import CacheDir
    from lazyfs.fetch.engine import Fetcher
    from lazyfs.node.housekeeping import Housekeeper
    from lazyfs.node.mounted import MountedImage
    from lazyfs.node.rundir import WorkerDir

OPERATIONS = frozenset({protocol.PIN, protocol.FETCH, protocol.COPIES})


class Copying:
    """Of one worker. `configured`: what it is to keep to; None: it reads that itself."""

    def __init__(self, fetcher: Fetcher, cache: CacheDir, housekeeper: Housekeeper, directory: WorkerDir, *,
                 mounts: Callable[[], Iterable[MountedImage]], note: Callable[[MountedImage], None],
                 ended: Callable[[], None]) -> None:
        """`mounts`, `note`: see FullCopies; `ended`: called when nothing is fetched any more, perhaps."""
        self._mounts = mounts
        self._housekeeper = housekeeper
        self.configured: config.Cache | None = None
        self.full = FullCopies(fetcher, cache, mounts, note)
        self.fetching = Fetching(fetcher, cache, housekeeper, directory, ended)

    async def run(self) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.full.run, self.configured)
            nursery.start_soon(self.fetching.run)

    async def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """
        See the module.

        Raises:
            UsageError: no such request. LazyfsError: it cannot be done.

        """
        operation = request["op"]
        if operation == protocol.COPIES:
            return self.describe()
        if operation == protocol.PIN:
            return await self._housekeeper.pin(str(request["name"]), pinned=bool(request["pinned"]))
        if request.get("stop"):
            return {"stopped": self.fetching.stop(str(request["image"]))}
        rate = int(request.get("rate", 0))
        if rate < 0:
            raise UsageError(f"rate {rate}: expected bytes a second, or 0")
        order = MountOrder.from_json({**request["order"], "seed": None, "document": None, "layer": None,
                                      "bootstrap_dir": None, "checked": False, "origin": ""})
        return self.fetching.begin(order, rate, pin=bool(request.get("pin"))).describe()

    def describe(self) -> dict[str, Any]:
        copies = [{"image": mounted.order.image, "bootstrap": str(mounted.opened.layer.digest),
                   "target": mounted.order.target, **self.full.describe(mounted)}
                  for mounted in self._mounts() if mounted.devices]
        return {"copies": copies, "fetches": self.fetching.describe(), "statistics": self.full.counters()}
