"""
What is read through a mount that is there already, gathered while its containers run; and which mount that is.

Layer: runner. Who calls: cli.profile_record. The worker is asked again and again (TOUCHED) for what is new: a mount
that ends takes its recorder along. A worker that took over knows nothing of before: its touches are appended, and
`gaps` counts it. Invariant: what is kept is bounded by what a Recording may hold.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from lazyfs.errors import LazyfsError, TargetError
from lazyfs.node.protocol import TOUCHED, ControlClient, WorkerGoneError
from lazyfs.node.rundir import all_worker_dirs, find_record
from lazyfs.node.unmount import resolve_target
from lazyfs.profile.recording import CONTAINER_COUNT_MAX, TOUCH_COUNT_MAX, Recording, Touch
from lazyfs.registry.reference import RegistryReference, parse_reference
from lazyfs.runner.recording import TOOL, MountedTables

if TYPE_CHECKING:
    from lazyfs.node.rundir import MountRecord

ANSWER_S = 30.0                  # of the worker
_TAKE_OVER_S = 20.0              # a daemon's next worker is there by then
_POLL_S = 0.1
_PREFIX_CHARS_MIN = 4            # of a container's id: less is a guess
_US_PER_MS = 1000


@dataclass(frozen=True, slots=True)
class Found:
    """A mount to follow. `container`: only what this one (or one whose id begins so) read; empty: everybody."""

    target: str
    image: str
    container: str = ""


def find_mounts(name: str) -> list[Found]:
    """
    The mounts that a name means: a directory, an image, or a container's id or its beginning; in this order.

    Raises:
        TargetError: none.

    """
    if name.startswith(("/", "./", "../")):
        target = resolve_target(name)
        record = find_record(target)
        if record is None:
            raise TargetError(f"{target} is not a lazyfs mount")
        return [Found(target, record[1].image)]
    records = [record for directory in all_worker_dirs() for record in directory.records()
               if record.worker.alive and not record.detached]
    images = [Found(record.target, record.image) for record in records if _is_image(record, name)]
    if images:
        return sorted(images, key=lambda found: found.target)
    containers = [Found(record.target, record.image, name) for record in records
                  if any(is_container(caller, name) for caller in _callers(record.target))]
    if not containers:
        raise TargetError(f"{name!r:.100}: no image of that name is mounted here, and no container of that id has read "
                          "from one", hint="name the directory that it is mounted on")
    return containers


def is_container(caller: str, name: str) -> bool:
    """Whether a caller's id is this one, or begins so."""
    return caller == name or (len(name) >= _PREFIX_CHARS_MIN and caller.startswith(name))


class Following:
    """
    One mount, followed. `with Following(found) as one: while one.poll(): ...; one.recording()`.

    Attributes:
        found: which.
        tables: its image, for naming files; read at once, while the mount is there.
        since_us: only touches from here on are told (skip_past()); on the clock of the first recorder.
        gaps: how many workers came after the first one that was asked.
        whole: the first worker had recorded from the mount on.
        unseen: devices that the kernel reads past the worker.
        read_ahead_kib: of the mount, when last asked.

    """

    def __init__(self, found: Found, *, fine: bool = False) -> None:
        """`fine`: no read-ahead until close(). Raises TargetError: no such mount. LazyfsError: a damaged cache."""
        self.found = found
        self.tables = MountedTables.of(found.target)
        self.since_us = 0
        self.gaps = self.read_ahead_kib = 0
        self.whole, self.truncated = True, False
        self.unseen: list[int] = []
        self._fine = fine
        self._client: ControlClient | None = None
        self._numbers: list[int] = []         # of the worker's devices in ours
        self._token = ""
        self._start = 0                       # in the worker's touches
        self._began_us: int | None = None     # of the first recorder; monotonic
        self._shift_us = 0                    # of the present one to the first
        self._latest_us = 0
        self._callers: dict[str, int] = {}
        self._touches: list[tuple[int, int, int, int, int]] = []

    def poll(self) -> bool:
        """
        Gather what is new. False: the mount is gone, and nothing more will come.

        Raises:
            LazyfsError: what the worker answers.

        """
        deadline = time.monotonic() + _TAKE_OVER_S
        while True:
            try:
                return self._ask_all()
            except WorkerGoneError:
                self._close()
                if find_record(self.found.target) is None or time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            except TargetError:     # not mounted by this worker any more
                return False

    def skip_past(self) -> None:
        """What was read until now is not told."""
        self.poll()
        assert self._began_us is not None
        self.since_us = int(time.monotonic() * 1e6) - self._began_us

    def recording(self) -> Recording:
        """
        All that was gathered, of the container that was asked for; times from the first touch that is told on.

        Raises:
            TargetError: that container has read nothing.

        """
        names = list(self._callers) or [""]
        wanted = {index for index, name in enumerate(names)
                  if not self.found.container or is_container(name, self.found.container)}
        rows = [row for row in self._touches if row[3] >= self.since_us and row[4] in wanted]
        if self.found.container and not wanted:
            raise TargetError(f"{self.found.target}: no container {self.found.container!r:.80} has read from it")
        first_us = rows[0][3] if rows else 0
        devices = {str(digest): table.device_size for digest, table in self.tables.devices}
        touches = tuple(Touch(device, start, end, (time_us - first_us) / _US_PER_MS, caller)
                        for device, start, end, time_us, caller in rows)
        return Recording(self.found.image, TOOL, tuple(devices.items()), tuple(names), touches, self.truncated)

    @property
    def read_by(self) -> list[str]:
        """The ids of the containers that have read; processes of none are left out."""
        return [name for name in self._callers if name]

    def _ask_all(self) -> bool:
        while True:
            answer = self._ask()
            if self._numbers_of(answer) and not self._take(answer):
                return True

    def _ask(self) -> dict[str, Any]:
        if self._client is None:
            found = find_record(self.found.target)
            if found is None:
                raise WorkerGoneError(self.found.target)
            self._client = ControlClient.connect(found[0].socket)
        answer: dict[str, Any] = self._client.request(
            TOUCHED, ANSWER_S, target=self.found.target, start=self._start, fine=self._fine)
        return answer

    def _numbers_of(self, answer: dict[str, Any]) -> bool:
        """See whose answer it is. False: of another recorder than before, which is to be asked from its beginning."""
        self.unseen, self.read_ahead_kib = list(answer["unseen"]), int(answer["read_ahead_kib"])
        if answer["token"] == self._token:
            return True
        began_us = int(time.monotonic() * 1e6) - int(answer["age_us"])
        if self._began_us is None:
            self._began_us, self.whole = began_us, bool(answer["whole"])
        else:
            self.gaps += 1
        self._shift_us = max(0, began_us - self._began_us)
        digests = list({str(digest): None for digest, _ in self.tables.devices})
        self._numbers = [digests.index(digest) for digest in answer["devices"]]
        again = self._start > 0
        self._token, self._start = answer["token"], 0
        return not again

    def _take(self, answer: dict[str, Any]) -> bool:
        """Keep the touches of an answer; whether there are more."""
        callers = []
        for name in answer["callers"]:
            if name not in self._callers and len(self._callers) >= CONTAINER_COUNT_MAX:
                name = next(iter(self._callers))   # noqa: PLW2901 - as the recorder does
            callers.append(self._callers.setdefault(name, len(self._callers)))
        for device, start, end, time_us, caller in answer["touches"]:
            if len(self._touches) >= TOUCH_COUNT_MAX:
                self.truncated = True
                return False
            self._latest_us = max(self._latest_us, time_us + self._shift_us)
            self._touches.append((self._numbers[device], start, end, self._latest_us, callers[caller]))
        self._start += len(answer["touches"])
        self.truncated |= bool(answer["truncated"])
        return answer["next"] is not None

    def _close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()


def _is_image(record: MountRecord, name: str) -> bool:
    """Whether the mounted image is the one named: the same words, or the same place and tag or digest."""
    if name in {record.image, record.bootstrap}:
        return True
    try:
        wanted, mounted = parse_reference(name), parse_reference(record.image)
    except LazyfsError:
        return False
    if wanted.identity != mounted.identity:
        return False
    if wanted.digest is not None:
        return wanted.digest == mounted.digest
    if isinstance(wanted, RegistryReference) and isinstance(mounted, RegistryReference):
        return wanted.tag == mounted.tag
    return wanted.text == mounted.text


def _callers(target: str) -> list[str]:
    """Who has read through a mount. Nobody, where its worker does not answer."""
    found = find_record(target)
    with contextlib.suppress(LazyfsError, WorkerGoneError):
        if found is not None:
            with ControlClient.connect(found[0].socket) as client:
                answer = client.request(TOUCHED, ANSWER_S, target=target, start=TOUCH_COUNT_MAX)
                return [str(name) for name in answer["callers"]]
    return []
