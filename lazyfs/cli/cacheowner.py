"""
Asking the worker that owns a cache directory.

Layer: cli. Who calls: the commands of `lazyfs cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from lazyfs.node.protocol import ControlClient


def connect_owner(path: Path) -> ControlClient | None:
    """A connection to the worker whose cache directory that is; None: none says so."""
    from lazyfs.node.protocol import HEALTH, ControlClient, WorkerGoneError  # noqa: PLC0415
    from lazyfs.node.rundir import WorkerDir, daemon_dir  # noqa: PLC0415

    for directory in (daemon_dir(), WorkerDir.of_cache(str(path))):
        try:
            client = ControlClient.connect(directory.socket)
        except WorkerGoneError:
            continue
        try:
            if client.request(HEALTH, 5.0)["cache_dir"] == str(path):
                return client
        except WorkerGoneError:
            pass
        except BaseException:
            client.close()
            raise
        client.close()
    return None


def ask_owner(path: Path, operation: str, timeout_s: float, **arguments: Any) -> dict[str, Any] | None:
    """
    One request to the worker that owns the directory; None: none says that it does.

    Raises:
        LazyfsError: what it answered.

    """
    from lazyfs.node.protocol import WorkerGoneError  # noqa: PLC0415

    client = connect_owner(path)
    if client is None:
        return None
    with client:
        try:
            answer: dict[str, Any] = client.request(operation, timeout_s, **arguments)
        except WorkerGoneError:
            return None
        return answer
