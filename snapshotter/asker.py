"""
The half of a pull that asks the registry, in a process of its own that starts before the command line is read.

The other half imports gRPC; each import takes a tenth of a second of one core, and a container's start waits for both.
Light to import: nothing but the standard library's smallest modules.

Layer: snapshotter. Who calls: lazyfs.cli.entry (begin), snapshotter.pull (take). State: the one process in store.
Protocol on a socket pair: we send the order, one line of JSON; it answers with frames (8 bytes of length, a pickle: it
is our own child): the PullImage, then the bootstrap's bytes if it is lazy. Instead of either may come a LazyfsError.
It ends with us, and with a closed connection.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

if TYPE_CHECKING:
    from snapshotter.pullimage import PullImage

BOOTSTRAP_BYTES_MAX: Final = 32 << 20    # a larger one is streamed by who wants it, not held in memory twice
_PR_SET_PDEATHSIG: Final = 1             # linux/prctl.h
_LINE_BYTES_MAX: Final = 1 << 20
_FRAME_BYTES_MAX: Final = BOOTSTRAP_BYTES_MAX + (32 << 20)   # documents and config: 4 + 4 + 8 MiB
_store: list[Asker] = []                 # of one at most


class Asker:
    """A process that is importing, or asks. For one thread at a time."""

    def __init__(self, process: int, connection: socket.socket) -> None:
        self._process = process
        self._connection = connection
        self._stream = connection.makefile("rb")

    def ask(self, reference: str, platform: str | None, name: str, snapshotter: str, registry: dict[str, Any]) -> None:
        """Say what is wanted; `registry`: lazyfs.registry.fields. Answers come by image() and bootstrap()."""
        words = {"reference": reference, "platform": platform, "name": name, "snapshotter": snapshotter,
                 "registry": registry}
        with contextlib.suppress(ConnectionError):       # image() will say so
            self._connection.sendall(json.dumps(words).encode() + b"\n")

    def image(self) -> PullImage:
        """Wait for the image. Raises whatever resolve() raises."""
        image: PullImage = self._next()
        return image

    def bootstrap(self) -> bytes:
        """Wait for the bootstrap of a lazy image that is not larger than BOOTSTRAP_BYTES_MAX; once."""
        data: bytes = self._next()
        return data

    def _next(self) -> Any:
        import pickle  # noqa: PLC0415 - our own child wrote it

        data = b""
        with contextlib.suppress(ConnectionError):
            size = int.from_bytes(self._stream.read(8), "big")
            data = self._stream.read(size) if 0 < size <= _FRAME_BYTES_MAX else b""
        if not data:
            from lazyfs.errors import SourceError  # noqa: PLC0415

            raise SourceError("the process that asks the registry has died", hint="pull again")
        value = pickle.loads(data)  # noqa: S301 - as above
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        """End it, whatever it does, and with it another thread's wait for it. Idempotent."""
        process, self._process = self._process, 0
        if process:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
            self._stream.close()             # waits for a reader, who now sees the end
            self._connection.close()


def begin() -> None:
    """Fork one and keep it in store. Call it while this process has one thread."""
    ours, theirs = socket.socketpair()
    process = os.fork()
    if process == 0:
        ours.close()
        _live(theirs)
    theirs.close()
    _store.append(Asker(process, ours))


def take() -> Asker | None:
    """The one in store, if any. It is the caller's now."""
    return _store.pop() if _store else None


def _live(connection: socket.socket) -> NoReturn:
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        import ctypes  # noqa: PLC0415

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        gc.disable()
        from lazyfs.registry import client, fields, remote  # noqa: F401, PLC0415 - while the order is being made
        from snapshotter import pullimage  # noqa: F401, PLC0415

        with connection, connection.makefile("rb") as stream:
            line = stream.readline(_LINE_BYTES_MAX)
            if line.endswith(b"\n"):
                _work(json.loads(line), connection)
    except (BrokenPipeError, ConnectionResetError):
        pass                             # nobody waits any more
    except BaseException:  # noqa: BLE001 - the child must never come back into its parent's code
        import traceback  # noqa: PLC0415

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(0)


def _work(order: dict[str, Any], connection: socket.socket) -> None:
    from lazyfs.errors import LazyfsError  # noqa: PLC0415
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.fields import from_fields  # noqa: PLC0415
    from snapshotter.pullimage import resolve  # noqa: PLC0415

    try:
        source = open_source(order["reference"], from_fields(order["registry"]))
        image = resolve(source, order["platform"], order["name"], order["snapshotter"])
        _send(connection, image)
        layer = image.bootstrap
        if layer is not None and layer.size <= BOOTSTRAP_BYTES_MAX:
            _send(connection, source.read_blob(layer.digest, layer.size))
    except LazyfsError as error:
        _send(connection, error)


def _send(connection: socket.socket, value: Any) -> None:
    import pickle  # noqa: PLC0415

    data = pickle.dumps(value)
    connection.sendall(len(data).to_bytes(8, "big") + data)
