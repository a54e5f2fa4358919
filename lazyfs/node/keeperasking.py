"""
Asking the daemon's keeper: one JSON line each way. The keeper's side: node.keeper.

Light to import, blocking. Layer: node. Who calls: cli.daemon, and whoever shows the node's state (node.observing, in
a thread; cli.status).
"""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from lazyfs.errors import BusyError, HostError, TargetError
from lazyfs.node.protocol import connect_to

if TYPE_CHECKING:
    from lazyfs.node.rundir import WorkerDir

ANSWER_S = 60.0
_ANSWER_BYTES_MAX = 1 << 20


def ask_keeper(
    directory: WorkerDir, operation: str, timeout_s: float = ANSWER_S, **arguments: Any
) -> dict[str, Any]:
    """
    The answer to one request.

    Raises:
        TargetError: no keeper runs. BusyError: it refuses, or does not answer. HostError: we may not ask.

    """
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(timeout_s)
        try:
            connect_to(client, directory.keeper_socket)
            client.sendall(json.dumps({"op": operation, **arguments}).encode())
            with client.makefile("rb") as stream:
                line = stream.readline(_ANSWER_BYTES_MAX)
        except (FileNotFoundError, ConnectionError):
            raise TargetError(_no_daemon(directory), hint="start it: lazyfs daemon") from None
        except PermissionError:
            raise HostError(f"{directory.keeper_socket} is for root only", hint="run it with sudo") from None
        except TimeoutError:
            raise BusyError(f"the daemon did not answer within {timeout_s:g} s", hint="look at its log") from None
    if not line.endswith(b"\n"):
        raise BusyError("the daemon ended before it answered", hint="try again; its log says why it ended")
    answer = json.loads(line)
    if "error" in answer:
        raise BusyError(answer["error"])
    result: dict[str, Any] = answer.get("result", {})
    return result


def _no_daemon(directory: WorkerDir) -> str:
    worker = directory.worker()
    if worker is None:
        return "no daemon runs on this node"
    return f"no daemon runs on this node; worker {worker.pid} of an earlier one still serves its mounts"
