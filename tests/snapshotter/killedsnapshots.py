"""
One operation on snapshots in a process that kills itself before its N-th write: for test_core_kills.

    python -m tests.snapshotter.killedsnapshots DIRECTORY N OPERATION [WORD ...]

Writes are statements to the database and changes of directories; both are counted, before they happen. Ends with exit
code 0 when the operation has fewer than N writes, by SIGKILL else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

from snapshotter.core import Snapshots
from snapshotter.failures import SnapshotExistsError
from tests.snapkit import PlainImages

CHANGES = {"os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.chown", "os.chmod"}


class Killer:
    """`left`: writes until the end."""

    def __init__(self, left: int) -> None:
        self.left = left

    def write(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, _arguments: tuple[object, ...]) -> None:
        if event in CHANGES:
            self.write()

    def statement(self, text: str) -> None:
        if not text.startswith(("SELECT", "WITH", "PRAGMA")):
            self.write()


def main(directory: str, count: str, operation: str, *words: str) -> None:
    hook = PlainImages(Path(directory) / "trees")
    killer = Killer(int(count))
    if operation == "open":
        sys.addaudithook(killer.audit)
    snapshots = Snapshots.open(Path(directory) / "root", hook)
    if operation != "open":
        snapshots._records._connection.set_trace_callback(killer.statement)
        sys.addaudithook(killer.audit)
        with contextlib.suppress(SnapshotExistsError):
            getattr(snapshots, operation)(*(json.loads(word) for word in words))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
