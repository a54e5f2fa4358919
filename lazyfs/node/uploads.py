"""
Sending what the starts of this node's images read to a collector, if the configuration says so; anonymously.

Layer: node. Who calls: node.daemonworker runs it, node.worker says when a mount ends (`leaving`). On the trio thread,
but for the request. State: what waits, and what was sent lately. Nothing of it may disturb what is served: one request
at a time, few that wait, each dropped when it fails for the third time. What is sent: a Recording of ranges and times,
of devices by their digests; no name of an image, host, container, path or user. The contributor's name is another one
for every image: two contributions of one node cannot be told to be.
"""

from __future__ import annotations

import hashlib
import logging
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from lazyfs import __version__
from lazyfs.errors import AuthError, LazyfsError, SourceError
from lazyfs.node.token import node_secret, read_token
from lazyfs.profile.contribution import CONTRIBUTION_BYTES_MAX, image_key, make_contribution
from lazyfs.profile.recording import Recording, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from lazyfs import config
    from lazyfs.node.mounted import MountedImage

LOOK_S = 2.0                     # how often mounts are looked at
IMAGE_PAUSE_S = 3600.0           # between two contributions to one image
RETRY_FIRST_S = 5.0              # doubles, times uniform(0.5, 1.5): a collector that comes back is not run over
_ATTEMPT_COUNT = 3
_REQUEST_S = 20.0
_WAITING_COUNT_MAX = 8           # of up to 4 MiB; a node that starts more at once has others to speak for them
_SENT_COUNT_MAX = 1000           # remembered
_ANSWER_BYTES_MAX = 4096
_JITTER = (1.0, 1.2)             # a thousand nodes that start one image at the same time
_log = logging.getLogger("lazyfs.node.uploads")


class Uploads:
    """Of one worker. `mounts`: those of now. `secret_path`: where the node's own secret is."""

    def __init__(self, settings: config.Profile, secret_path: Path, mounts: Callable[[], Iterable[MountedImage]],
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._secret_path = secret_path
        self._mounts = mounts
        self._clock = clock
        self._done: set[str] = set()                  # tokens of recorders
        self._sent: dict[str, float] = {}             # by image key: when
        self._send, self._receive = trio.open_memory_channel[tuple[str, Recording]](_WAITING_COUNT_MAX)
        self._jitter = random.uniform(*_JITTER)       # noqa: S311 - spreads load

    async def run(self) -> None:
        """For as long as the worker runs. Never raises an Exception."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_all)
            while True:
                await trio.sleep(LOOK_S)
                mounts = list(self._mounts())
                self._done &= {mounted.recorder.token for mounted in mounts}
                for mounted in mounts:
                    after_us = self._settings.upload_after_s * self._jitter * 1e6
                    first = next(mounted.recorder.rows(0, 1), None)
                    if first is not None and mounted.recorder.age_us - first[3] >= after_us:
                        self.leaving(mounted)

    def leaving(self, mounted: MountedImage) -> None:
        """A mount ends, or has been read for long enough: what it knows is sent if it is a whole start."""
        recorder = mounted.recorder
        if (recorder.token in self._done or mounted.order.record or not recorder.whole or not recorder.count
                or any(index < 0 for index in mounted.device_indexes)):
            return
        self._done.add(recorder.token)
        key = image_key(str(digest) for digest, _ in mounted.opened.devices)
        now = self._clock()
        if now - self._sent.get(key, -IMAGE_PAUSE_S) < IMAGE_PAUSE_S:
            return
        devices = [(str(digest), table.device_size) for digest, table in mounted.opened.devices]
        made = make_contribution(f"lazyfs {__version__}", devices, recorder.rows(0, recorder.count),
                                 int(self._settings.upload_after_s * 1e6))
        if made is None:
            return
        try:
            self._send.send_nowait((key, made))
        except trio.WouldBlock:
            return
        self._sent.pop(key, None)
        self._sent[key] = now
        if len(self._sent) > _SENT_COUNT_MAX:
            del self._sent[next(iter(self._sent))]

    async def _send_all(self) -> None:
        async for key, recording in self._receive:
            try:
                await self._send_one(key, recording)
            except (LazyfsError, OSError) as error:
                _log.warning("a profile was not sent, and is dropped: %s", error)
            except Exception:  # noqa: BLE001 - must not end the worker
                _log.exception("a profile was not sent")

    async def _send_one(self, key: str, recording: Recording) -> None:
        pause_s = RETRY_FIRST_S
        for number in range(1, _ATTEMPT_COUNT + 1):
            try:
                await trio.to_thread.run_sync(self._post, key, recording, abandon_on_cancel=True)
            except SourceError as error:
                if number == _ATTEMPT_COUNT or not error.transient:
                    raise
                await trio.sleep(pause_s * random.uniform(0.5, 1.5))   # noqa: S311 - spreads load
                pause_s *= 2
            else:
                _log.info("a profile was sent", extra={"fields": {"touches": len(recording.touches)}})
                return

    def _post(self, key: str, recording: Recording) -> None:
        """
        Send one. Blocking, at most _REQUEST_S.

        Raises:
            SourceError: it did not arrive, or was refused. ConfigError: no token. UsageError: no such authority.

        """
        from lazyfs.registry.options import RegistryOptions  # noqa: PLC0415 - only where it is wanted
        from lazyfs.registry.transport import Call, Transport  # noqa: PLC0415

        settings = self._settings
        body = to_json(recording)
        if len(body) > CONTRIBUTION_BYTES_MAX:
            raise SourceError(f"a profile of {len(body)} bytes", transient=False)
        secret = node_secret(self._secret_path)
        contributor = hashlib.blake2s(key.encode(), key=secret, digest_size=16).hexdigest()
        transport = Transport(RegistryOptions(ca_file=Path(settings.ca_file) if settings.ca_file else None))
        headers = {"Authorization": f"Bearer {read_token(settings.token_file).reveal()}",
                   "Content-Type": "application/json"}
        url = f"{settings.upload.rstrip('/')}/v1/profiles/{contributor}"
        try:
            with transport.send(Call("POST", url, headers, body, len(body)), time.monotonic() + _REQUEST_S) as answer:
                answer.read_all(_ANSWER_BYTES_MAX)
                if answer.status in {401, 403}:
                    raise AuthError(f"profile.upload {settings.upload}: the collector wants another token")
                if answer.status != 200:
                    raise SourceError(f"profile.upload {settings.upload}: the collector answered {answer.status}",
                                      transient=answer.status >= 500 or answer.status == 429)
        finally:
            transport.close()
