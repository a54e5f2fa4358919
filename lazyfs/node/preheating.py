"""
What the daemon does of a preheat task: all of a lazy image into the cache, as `lazyfs cache fetch` does.

Layer: node. Who calls: peers.jobs.Agent, in node.peering. Ordinary images and files are the mirror's. State: none
but node.fetching's, which goes on with it when this worker is replaced; the tracker then asks the next one again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import trio

from lazyfs.errors import SourceError
from lazyfs.fs.isolate import error_from
from lazyfs.image.manifest import is_lazy
from lazyfs.image.oci import parse_manifest
from lazyfs.node.fetching import COMPLETE, FAILED
from lazyfs.node.order import MountOrder
from lazyfs.registry.fields import to_fields
from lazyfs.registry.opening import open_source
from lazyfs.registry.options import Secret
from lazyfs.registry.select import select_image

if TYPE_CHECKING:
    from lazyfs.node.fetching import Fetching
    from lazyfs.peers.jobs import Progress, Task
    from lazyfs.registry.options import RegistryOptions

_POLL_S: Final = 0.5


class NodePreheating:
    """See the module."""

    def __init__(self, fetching: Fetching) -> None:
        self._fetching = fetching

    async def do(self, task: Task, progress: Progress) -> bool:
        """peers.jobs.Doing."""
        if task.kind != "image":
            return False
        order = MountOrder(task.source, target="/", platform=task.platform or None, by_node=True)   # no mount
        options = order.registry_options()
        if task.authorization:
            options = replace(options, shown=Secret(task.authorization))
            order = replace(order, by_node=False, registry=to_fields(options))
        if not await trio.to_thread.run_sync(_is_lazy, task, options, abandon_on_cancel=True):
            return False
        fetch = self._fetching.begin(order, 0, pin=False)
        while True:
            found: dict[str, Any] = fetch.describe()
            progress.show(found["present_bytes"], found["total_bytes"])
            if found["state"] == COMPLETE:
                return True
            if found["state"] == FAILED:
                error = found["error"]
                raise error_from(error) if error is not None else SourceError(f"{task.source}: not fetched")
            await trio.sleep(_POLL_S)


def _is_lazy(task: Task, options: RegistryOptions) -> bool:
    """Blocking. Raises LazyfsError: nobody says."""
    source = open_source(task.source, options)
    try:
        document = select_image(source, task.platform or None)
        return is_lazy(parse_manifest(document.data, document.media_type))
    finally:
        source.close()
