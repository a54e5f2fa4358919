"""
The image-service proxy and its feeder, out of the node's configuration.

Layer: snapshotter.credentials, on top. Who calls: cli.snapshotter, once. Start-up asks nobody.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.node.rundir import WorkerDir
from snapshotter.credentials.criproxy import ImageServiceProxy
from snapshotter.credentials.feeder import Feeder
from snapshotter.credentials.pulled import PulledCredentials

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazyfs.config import Config


@contextlib.contextmanager
def credential_proxy(config: Config) -> Iterator[Callable[[Any], None] | None]:
    """What adds CRI's image service to a grpc.Server; None if the configuration wants none. Leave after it stopped."""
    if not config.registry.cri_keychain:
        yield None
        return
    keep = PulledCredentials()
    with Feeder(keep, WorkerDir(Path(config.daemon.run_dir) / "daemon").socket) as feeder:
        proxy = ImageServiceProxy(config.snapshotter.containerd_address, feeder.note)
        try:
            yield proxy.add_to
        finally:
            proxy.close()
