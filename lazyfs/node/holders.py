"""
Who uses a mount: for the message of an unmount that is refused.

Layer: node. Reads links and text under /proc only, never the mount itself (which may hang), and gives up at a bound.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SCAN_S_MAX = 2.0
_FOUND_MAX = 10
_MAPS_BYTES_MAX = 4 << 20


def describe_holders(target: str) -> str:
    """`1234 (nginx), 1301 (bash)`; "" if none is seen (another mount namespace may hold it)."""
    deadline = time.monotonic() + _SCAN_S_MAX
    found: list[str] = []
    for pid in _pids():
        if time.monotonic() > deadline or len(found) >= _FOUND_MAX:
            found.append("...")
            break
        if _uses(pid, target):
            found.append(f"{pid} ({_name(pid)})")
    return ", ".join(found)


def _pids() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _uses(pid: int, target: str) -> bool:
    below = target.rstrip("/") + "/"
    return any(path == target or path.startswith(below) for path in _paths(pid))


def _paths(pid: int) -> Iterator[str]:
    root = f"/proc/{pid}"
    for name in ("cwd", "root", "exe"):
        with contextlib.suppress(OSError):
            yield os.readlink(f"{root}/{name}")   # noqa: PTH115 - plain text, not a path to walk
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{root}/fd"):   # noqa: PTH208
            with contextlib.suppress(OSError):
                yield os.readlink(f"{root}/fd/{name}")   # noqa: PTH115
    with contextlib.suppress(OSError), open(f"{root}/maps", "rb") as file:   # noqa: PTH123
        for line in file.read(_MAPS_BYTES_MAX).splitlines():
            fields = line.split(None, 5)
            if len(fields) == 6:
                yield os.fsdecode(fields[5])


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    return "?"
