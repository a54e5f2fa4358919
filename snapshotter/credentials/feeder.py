"""
Hands the credentials of pulls to the node's daemon, and to each worker of it again.

One thread, one connection that stays open: when it ends the worker is another one (or none), so all that is known is
handed over again, as soon as somebody listens. Once in a while the daemon is asked which of them it uses: those live
on here, the others are forgotten in time.

Layer: snapshotter.credentials. Who calls: the command line. A daemon that is not there costs a look a second; nothing
waits for it.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any, Self

from lazyfs.errors import DeadlineError, LazyfsError
from lazyfs.node import protocol
from lazyfs.node.protocol import ControlClient, WorkerGoneError

if TYPE_CHECKING:
    from pathlib import Path

    from snapshotter.credentials.pulled import Pulled, PulledCredentials

_LOOK_EVERY_S = 0.5              # for a new worker, while a connection lasts
_ASK_USED_EVERY = 120            # looks: a minute
_ABSENT_S = 0.25                 # between looks for a daemon that is not there
_REQUEST_TIMEOUT_S = 5.0
_BATCH_BYTES_MAX = protocol.LINE_BYTES_MAX // 2
_LOG = logging.getLogger("lazyfs.snapshotter")


class Feeder:
    """See the module. `start()`, or use as a context manager."""

    def __init__(self, keep: PulledCredentials, socket: Path) -> None:
        self._keep = keep
        self._socket = socket
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="credentials", daemon=True)

    def note(self, pulled: Pulled) -> None:
        """Keep it, and hand it over at once. Does not block."""
        self._keep.note(pulled)
        self._wake.set()

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(2 * _REQUEST_TIMEOUT_S)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        said = False
        while not self._ended.is_set():
            try:
                with ControlClient.connect(self._socket, _REQUEST_TIMEOUT_S) as client:
                    self._feed(client)
            except (WorkerGoneError, DeadlineError):   # between two workers nobody answers
                pass
            except LazyfsError as error:   # an older daemon, which does not know the operation
                if not said:
                    _LOG.warning("the daemon does not take credentials: %s", error)
                said = True
            except Exception:   # noqa: BLE001 - pulls must go on; the next try may do
                _LOG.exception("handing over credentials failed")
            self._ended.wait(_ABSENT_S)

    def _feed(self, client: ControlClient) -> None:
        """To one worker, until it is gone. Raises WorkerGoneError, LazyfsError."""
        number = looks = 0
        while not self._ended.is_set():
            self._wake.clear()
            fresh = self._keep.after(number)
            batches = _batches([one.to_json(self._keep.lifetime_s) for one in fresh])
            if not batches and looks % _ASK_USED_EVERY == 0:
                batches = [[]]   # to begin with: that there are none is worth knowing, too
            for place, batch in enumerate(batches, 1):
                self._hand_over(client, batch, more=place < len(batches))
            number = max([number, *(one.number for one in fresh)])
            looks += 1
            if not self._wake.wait(_LOOK_EVERY_S) and client.is_closed():
                return

    def _hand_over(self, client: ControlClient, entries: list[dict[str, Any]], *, more: bool) -> None:
        answer = client.request(protocol.CREDENTIALS, _REQUEST_TIMEOUT_S, entries=entries, more=more)
        self._keep.used((host, repository) for host, repository in answer["used"])


def _batches(entries: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """So many at once as fit a line of the protocol."""
    batches: list[list[dict[str, Any]]] = []
    size = _BATCH_BYTES_MAX
    for entry in entries:
        length = len(json.dumps(entry)) + 2
        if size + length > _BATCH_BYTES_MAX:
            batches.append([])
            size = 0
        batches[-1].append(entry)
        size += length
    return batches
