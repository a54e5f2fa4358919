"""
The worker's side of the control protocol (node.protocol): who may ask, what is called, how an answer is written.

Layer: node. Who calls: node.worker. A request is cancelled when its connection closes before the answer: a mount whose
client was interrupted is undone. A mount may be `attached`: it then lasts as long as its connection.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import trio

from lazyfs.errors import LazyfsError, UsageError
from lazyfs.fs.isolate import error_to
from lazyfs.node import copying, protocol
from lazyfs.node.callers import foreigner
from lazyfs.node.housekeeping import Housekeeper, Request
from lazyfs.node.order import MountOrder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from lazyfs.node.handed import HandedCredentials
    from lazyfs.node.observing import Observer
    from lazyfs.node.scrubbing import Scrubbing
    from lazyfs.node.touches import Touches

_log = logging.getLogger("lazyfs.node")
_CONNECTION_COUNT_MAX = 64


class Controlled(Protocol):
    """What the requests act on."""

    @property
    def closing(self) -> bool: ...

    @property
    def housekeeper(self) -> Housekeeper: ...

    @property
    def scrubbing(self) -> Scrubbing: ...

    @property
    def credentials(self) -> HandedCredentials: ...

    @property
    def touches(self) -> Touches: ...

    @property
    def observer(self) -> Observer: ...

    @property
    def copying(self) -> copying.Copying: ...

    async def mount(self, order: MountOrder, *, ensure: bool) -> dict[str, Any]: ...

    async def unmount(self, target: str, *, lazy: bool, force: bool) -> dict[str, Any]: ...

    def rest(self, target: str) -> dict[str, Any]: ...

    def list_mounts(self) -> list[dict[str, Any]]: ...

    def health(self) -> dict[str, Any]: ...

    def shut_down(self) -> None: ...


def listen(path: Path) -> trio.SocketListener:
    """Listen at `path` (replaced if it is there: the caller holds the directory's lock). Mode 0600."""
    path.unlink(missing_ok=True)
    server = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mask = os.umask(0o177)
    try:
        server._sock.bind(f"/proc/self/fd/{directory}/{path.name}")  # type: ignore[attr-defined]  # noqa: SLF001
    finally:
        os.umask(mask)
        os.close(directory)
    server.listen(_CONNECTION_COUNT_MAX)
    return trio.SocketListener(server)


async def serve_connection(connection: trio.SocketStream, worker: Controlled, *, starter: bool = False) -> None:
    """
    Answer one connection's requests until it closes. Never raises an Exception.

    Args:
        connection: of whoever asks.
        worker: who is asked.
        starter: the connection is that of the process that forked us; only it may seed an order.

    """
    attached: list[str] = []
    fine: list[str] = []
    try:
        async with connection:
            if who := foreigner(connection.socket):
                _log.warning("control connection refused: %s", who)
                return
            await _serve_lines(connection, Asked(worker, attached, starter, fine))
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    except Exception:  # noqa: BLE001 - one bad connection must not end the worker
        _log.exception("control connection failed")
    finally:
        worker.touches.end_fine(fine)
        if attached:
            with trio.CancelScope(shield=True):
                await _detach(worker, attached)


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked by one connection, and what that has attached to itself. `fine`: names of Touches.read_finely()."""

    worker: Controlled
    attached: list[str]
    starter: bool
    fine: list[str]


async def _serve_lines(connection: trio.SocketStream, asked: Asked) -> None:
    buffer = bytearray()
    while True:
        while b"\n" not in buffer:
            part = await connection.receive_some(65536)
            if not part or len(buffer) > protocol.LINE_BYTES_MAX:
                return
            buffer += part
        line, _, rest = bytes(buffer).partition(b"\n")
        buffer = bytearray(rest)
        reply = await _answer_while_connected(connection, asked, line)
        if reply is None:
            return
        await connection.send_all(json.dumps(reply).encode() + b"\n")


async def _answer_while_connected(
    connection: trio.SocketStream, asked: Asked, line: bytes
) -> dict[str, Any] | None:
    """The reply; None if the connection closed first (the request has then been cancelled)."""
    reply: dict[str, Any] | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_when_closed, connection, nursery.cancel_scope)
        reply = await _answer(asked, line)
        nursery.cancel_scope.cancel()
    return reply


async def _cancel_when_closed(connection: trio.SocketStream, scope: trio.CancelScope) -> None:
    """Watch without reading: what comes next belongs to the next request."""
    while True:
        await trio.lowlevel.wait_readable(connection.socket)
        try:
            data = await connection.socket.recv(1, socket.MSG_PEEK)
        except OSError:
            data = b""
        if not data:
            scope.cancel()
            return
        await trio.sleep(0.05)   # a client that does not wait for its answer


async def _answer(asked: Asked, line: bytes) -> dict[str, Any]:
    try:
        request = json.loads(line)
        if asked.worker.closing:
            return {"closing": True}
        return {"result": await _dispatch(asked, request)}
    except LazyfsError as error:
        return {"error": error_to(error)}
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        kind = "DiskFullError" if full else "HostError"
        where = f"{error.filename}: " if error.filename else ""
        return {"error": {"kind": kind, "message": f"{where}{error.strerror or error}", "hint": ""}}
    except Exception as error:  # noqa: BLE001 - the client is told, the worker goes on
        _log.exception("control request failed")
        return {"error": error_to(error)}


async def _mount(asked: Asked, request: dict[str, Any]) -> Any:
    order = MountOrder.from_json(request["order"])
    if not asked.starter:
        layer = order.layer if order.bootstrap_dir is not None else None
        order = replace(order, seed=None, document=None, layer=layer, checked=False, origin="")
    result = await asked.worker.mount(order, ensure=bool(request.get("ensure")))
    if request.get("attached"):
        asked.attached.append(order.target)
    return result


async def _dispatch(asked: Asked, request: dict[str, Any]) -> Any:
    worker = asked.worker
    operation = request.get("op")
    if operation == protocol.MOUNT:
        return await _mount(asked, request)
    if operation == protocol.UNMOUNT:
        lazy, force = bool(request.get("lazy")), bool(request.get("force"))
        return await worker.unmount(str(request["target"]), lazy=lazy, force=force)
    if operation in {protocol.USAGE, protocol.EVICT} | copying.OPERATIONS:
        return await _keep_house(worker, request)
    waiting: dict[Any, Callable[[], Awaitable[Any]]] = {
        protocol.SCRUB: lambda: worker.scrubbing.piece(request), protocol.STATUS: worker.observer.snapshot,
    }
    if operation in waiting:
        return await waiting[operation]()
    plain: dict[Any, Callable[[], Any]] = {
        protocol.TRACE: lambda: _trace(worker, request), protocol.DUMP: worker.observer.dump,
        protocol.LIST: worker.list_mounts, protocol.STATS: worker.observer.statistics, protocol.HEALTH: worker.health,
        protocol.TOUCHED: lambda: _touched(asked, request),
        protocol.REST: lambda: worker.rest(str(request["target"])),
        protocol.CREDENTIALS: lambda: worker.credentials.take(request.get("entries"), more=bool(request.get("more"))),
    }
    if operation in plain:
        return plain[operation]()
    if operation == protocol.SHUTDOWN:
        worker.shut_down()
        return True
    raise UsageError(f"unknown control operation {operation!r:.40}")


def _trace(worker: Controlled, request: dict[str, Any]) -> dict[str, Any]:
    """`after`: a read's number; `over`: seconds, of reads that wait still. See Observer.trace()."""
    try:
        after, over_s = int(request.get("after", 0)), float(request.get("over", 0.0))
    except (TypeError, ValueError, OverflowError):
        raise UsageError("expected numbers after and over") from None
    return worker.observer.trace(after, over_s)


def _touched(asked: Asked, request: dict[str, Any]) -> dict[str, Any]:
    """`fine`: from now on, and until the connection closes, the kernel reads no more than it is asked for."""
    target = str(request["target"])
    if request.get("fine") and not asked.fine:
        asked.fine.extend(asked.worker.touches.read_finely(target))
    return asked.worker.touches.touched(target, int(request.get("start", 0)))


async def _keep_house(worker: Controlled, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] in copying.OPERATIONS:
        return await worker.copying.answer(request)
    if request["op"] == protocol.EVICT:
        return await worker.housekeeper.evict(Request.from_json(request))
    bootstrap = request.get("bootstrap")
    return await worker.housekeeper.usage(None if bootstrap is None else str(bootstrap))


async def _detach(worker: Controlled, targets: list[str]) -> None:
    for target in targets:
        try:
            await worker.unmount(target, lazy=True, force=False)
        except LazyfsError as error:
            _log.info("%s: %s", target, error)
