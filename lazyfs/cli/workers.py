"""
Asking all workers of this node: the daemon's, and those of `lazyfs mount` without one.

Layer: cli. Who calls: status, trace, metrics. For root, or for the user whose workers they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from lazyfs.errors import HostError, LazyfsError

if TYPE_CHECKING:
    from lazyfs.node.rundir import WorkerDir

ANSWER_S = 10.0


class Answer(NamedTuple):
    """Of one worker. `found` None: it did not answer, `reason` says why. `daemon`: it is the daemon's."""

    directory: WorkerDir
    daemon: bool
    found: dict[str, Any] | None
    reason: str = ""


def ask_all(operation: str, **arguments: Any) -> list[Answer]:
    """
    The daemon's first; workers that are gone are left out, but for the daemon's.

    Raises:
        HostError: we may not ask.

    """
    from lazyfs.node.rundir import all_worker_dirs, daemon_dir  # noqa: PLC0415 - start-up time of --help

    daemon = daemon_dir()
    directories = [daemon, *(one for one in all_worker_dirs() if one.root != daemon.root)]
    answers = [_ask(one, operation, arguments, is_daemon=one.root == daemon.root) for one in directories]
    return [one for one in answers if one is not None]


def _ask(directory: WorkerDir, operation: str, arguments: dict[str, Any], *, is_daemon: bool) -> Answer | None:
    from lazyfs.node.protocol import ControlClient, WorkerGoneError  # noqa: PLC0415

    try:
        with ControlClient.connect(directory.socket) as client:
            return Answer(directory, is_daemon, client.request(operation, ANSWER_S, **arguments))
    except WorkerGoneError as error:
        if isinstance(error.__cause__, PermissionError):
            raise HostError(f"{directory.socket} is private to its user", hint="run it with sudo") from None
        expected = is_daemon and directory.keeper() is not None
        return Answer(directory, is_daemon, None, f"nobody answers at {directory.socket}") if expected else None
    except LazyfsError as error:
        return Answer(directory, is_daemon, None, str(error))
