"""
What the snapshotter asks of the node's daemon, over its control socket: mount, unmount, rest, how much it keeps.

The daemon may be handing over to its next worker at any moment. The keeper holds the socket meanwhile, so requests
wait or are cut off, and are made again until the deadline: all of them can be made twice. Nobody at the socket at all
is something else: after a short while (a restart of the keeper) it is said clearly.

Layer: snapshotter. Who calls: lazy, from many threads; each request has a connection of its own. No state.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lazyfs.errors import BusyError, DeadlineError, HostError, TargetError, UsageError
from lazyfs.node import protocol
from lazyfs.node.protocol import ControlClient, WorkerGoneError
from lazyfs.node.rundir import ProcessIdentity
from snapshotter.model import Usage

if TYPE_CHECKING:
    from lazyfs.node.order import MountOrder
    from lazyfs.node.rundir import WorkerDir

MOUNT_TIMEOUT_S = 30.0           # of one mount, the daemon's hand-over included; the kubelet waits 120 s
UNMOUNT_TIMEOUT_S = 10.0
USAGE_TIMEOUT_S = 2.0            # containerd asks for all snapshots every 10 s
ABSENT_S = 3.0                   # a keeper that is being restarted listens again after 1 s
_CONNECT_TIMEOUT_S = 5.0
_PAUSE_FIRST_S, _PAUSE_MAX_S = 0.01, 0.2


@dataclass(frozen=True, slots=True)
class DaemonLink:
    """The daemon of a run directory, whether it runs or not."""

    directory: WorkerDir

    def mount(self, order: MountOrder) -> None:
        """
        Have the image mounted; nothing is done if it is.

        Raises:
            TargetError: something else is mounted there.
            HostError: the daemon does not run. DeadlineError: it did not answer in time. LazyfsError: its answer.

        """
        self._ask(protocol.MOUNT, MOUNT_TIMEOUT_S, ABSENT_S, order=order.to_json(), ensure=True)

    def unmount(self, target: str) -> None:
        """
        Have it unmounted; who still uses it is served until it is done. Nothing is done if it is not mounted.

        Raises:
            HostError, DeadlineError, LazyfsError: as mount().

        """
        try:
            self._ask(protocol.UNMOUNT, UNMOUNT_TIMEOUT_S, 0, target=target, lazy=True)
        except BusyError:
            raise
        except TargetError:   # not mounted by it
            return

    def rest(self, target: str) -> None:
        """
        Have it fetch nothing ahead of that image any more, until mount() is said again.

        Raises:
            LazyfsError: as usage().

        """
        self._ask(protocol.REST, USAGE_TIMEOUT_S, 0, target=target)

    def serves(self, target: str, digest: str) -> bool:
        """Whether the daemon has just that image mounted there. Raises as mount()."""
        found = self._ask(protocol.LIST, UNMOUNT_TIMEOUT_S, 0)
        return any(one.get("target") == target and one.get("bootstrap") == digest and not one.get("detached")
                   for one in found)

    def keeper(self) -> ProcessIdentity | None:
        """The process that holds the FUSE connection, if it lives: as long as it does, mounts are served."""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            data = json.loads(self.directory.keeper_identity.read_bytes())
            identity = ProcessIdentity(data["pid"], data["start_ticks"], data["boot_id"])
            return identity if identity.alive else None
        return None

    def usage(self, digest: str) -> Usage:
        """
        Disk use of the image's data in the cache.

        Raises:
            LazyfsError: the daemon does not run, does not answer, or is of a version that cannot say.

        """
        try:
            answer = self._ask(protocol.USAGE, USAGE_TIMEOUT_S, 0, bootstrap=digest)
            return Usage(int(answer["bytes"]), int(answer["inodes"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"the daemon's answer about disk use is unexpected: {error!r:.100}") from error

    def _ask(self, operation: str, timeout_s: float, absent_s: float, **arguments: Any) -> Any:
        begin = time.monotonic()
        deadline, pause_s = begin + timeout_s, _PAUSE_FIRST_S
        while True:
            try:
                client = ControlClient.connect(self.directory.socket, min(timeout_s, _CONNECT_TIMEOUT_S))
            except WorkerGoneError as error:
                if time.monotonic() + pause_s > begin + absent_s:
                    raise HostError(
                        f"the lazyfs daemon does not run: nobody answers at {self.directory.socket} ({error})",
                        hint="start it: systemctl start lazyfs; look at it: lazyfs daemon status") from error
            else:
                with client:
                    try:
                        return client.request(operation, max(0.1, deadline - time.monotonic()), **arguments)
                    except WorkerGoneError as error:
                        if time.monotonic() + pause_s > deadline:
                            text = f"no worker of the lazyfs daemon answered within {timeout_s:g} s ({error})"
                            raise DeadlineError(text, hint="look at it: lazyfs daemon status") from error
                    except BusyError:   # its target is being mounted or unmounted for somebody who has gone
                        if time.monotonic() + pause_s > deadline:
                            raise
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_MAX_S)
