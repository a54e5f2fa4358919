"""
Where the `lazyfs` command begins: for `mount`, the worker's process starts importing before the command line is read,
for `pull` the process that asks the registry. A container's start waits for both: no time goes to garbage collection.

Light: imports nothing that `lazyfs.cli.main` would not. Who calls: the console script, `python -m lazyfs`.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Final, NoReturn

_EXIT_INTERRUPTED: Final = 130     # cli.main.EXIT_INTERRUPTED, which takes importing
_OBJECTS_COUNT: Final = 200_000    # imports make fewer; a pull of many gigabytes still gets its cycles collected


def main() -> None:
    """Run the command of sys.argv; exits."""
    try:
        _run()
    except KeyboardInterrupt:   # before cli.main was there to say so
        sys.exit(_EXIT_INTERRUPTED)


def _run() -> None:
    starts_worker = _will_start_a_worker(sys.argv[1:])
    pulls = sys.argv[1:2] == ["pull"] and not {"-h", "--help"} & set(sys.argv)
    quick = starts_worker or pulls
    if quick:
        gc.set_threshold(_OBJECTS_COUNT)   # this process lives for a moment, and imports most of the time
    if starts_worker:
        from lazyfs.node import early  # noqa: PLC0415

        early.begin()
    if pulls:
        from snapshotter import asker  # noqa: PLC0415

        asker.begin()
    from lazyfs.cli.main import main as run  # noqa: PLC0415

    try:
        run()
    finally:
        if quick or sys.argv[1:2] == ["convert"]:
            _end_at_once(sys.exc_info()[1])


def _end_at_once(ended: BaseException | None) -> NoReturn:
    """
    Taking numpy and urllib3 apart would take 50 ms more, after a conversion also its many objects: 100 ms.

    main() has flushed stdout, and nothing else is open.
    """
    sys.stderr.flush()
    os._exit(ended.code if isinstance(ended, SystemExit) and isinstance(ended.code, int) else 1)


def _will_start_a_worker(arguments: list[str]) -> bool:
    """A guess, on the safe side: `mount` by root, with no worker about. A wrong one costs time, nothing else."""
    if arguments[:1] != ["mount"] or os.geteuid() != 0 or {"-h", "--help"} & set(arguments):
        return False
    run_dir = Path(os.environ.get("LAZYFS_RUN_DIR") or "/run/lazyfs")
    return not any(run_dir.glob("*/control.sock"))
