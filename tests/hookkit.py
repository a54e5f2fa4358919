"""
Faults inside a daemon's worker: what a bug in a handler, or a library in trouble, would do there.

    hooks = Hooks(tmp_path)
    start_daemon(machine, environment=hooks.environment)     # every worker of it has them, the next ones too
    hooks.set("readlink", "raise")                           # from now on; kinds: WORKER_KINDS
    hooks.clear()

A worker runs as it always does; Python itself imports `sitecustomize` at its start, which puts a wrapper around some
methods (TARGETS). The wrapper looks at a file, each time: that is how a running worker is told. No code of lazyfs
knows of it.
"""

from __future__ import annotations

import importlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

CONTROL = "LAZYFS_TEST_HOOKS"       # names the file: lines of "<target> <kind>"
HANGING, CLOCK = ".hanging", ".clock"
ROOT = Path(__file__).resolve().parents[1]
_OPERATIONS = "lazyfs.fs.operations:LazyOperations"
# What can be hooked. `device`: reads that have to wait, below the time limit of fs.
TARGETS = {
    **{name: f"{_OPERATIONS}.{name}" for name in (
        "lookup", "status", "readlink", "xattrs", "readdir", "block_count", "open", "opendir", "release", "read_now",
        "read")},
    "device": "lazyfs.fetch.engine:Fetcher.read",
}
# raise: an exception that nobody expects · memory: MemoryError · sleep: never comes back, others go on (only async
# targets) · block: never comes back, and holds the loop
KINDS = ("raise", "memory", "sleep", "block")


class Hooks:
    """One file of orders, and the environment in which Python obeys them."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "hooks"
        site = directory / "site"
        site.mkdir()
        site.joinpath("sitecustomize.py").write_text(
            "import sys\nif 'lazyfs.node.daemonworker' in sys.orig_argv:\n    from tests import hookkit\n"
            "    hookkit.install()\n")
        self.environment = {CONTROL: str(self._file), "PYTHONPATH": f"{site}:{ROOT}"}

    def set(self, target: str, kind: str) -> None:
        """From the next call on. One at a time."""
        assert target in TARGETS
        assert kind in KINDS
        temporary = self._file.with_suffix(".new")
        temporary.write_text(f"{target} {kind}")
        temporary.replace(self._file)

    def clear(self) -> None:
        self._file.unlink(missing_ok=True)

    def set_clock(self, ahead_s: float) -> None:
        """The wall clock (time.time) of every worker jumps: so many seconds ahead of the machine's from now on."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(str(ahead_s))
        temporary.replace(self._file.with_suffix(CLOCK))

    def is_hanging(self) -> bool:
        """Whether a worker has come to a `block` or `sleep` (since the Hooks were made)."""
        return self._file.with_suffix(HANGING).exists()


# --- in the worker ---------------------------------------------------------------------------------------------------


def install() -> None:
    """Wrap all targets of this process."""
    file = os.environ[CONTROL]
    for name, place in TARGETS.items():
        module, _, path = place.partition(":")
        owner, _, method = path.partition(".")
        kind = getattr(importlib.import_module(module), owner)
        setattr(kind, method, _wrapped(name, getattr(kind, method), file))
    real, clock = time.time, Path(file).with_suffix(CLOCK)
    time.time = lambda: real() + (float(clock.read_text()) if clock.exists() else 0.0)


def _wrapped(name: str, function: Callable[..., Any], file: str) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **words: Any) -> Any:
        kind = _told(file, name)
        if kind == "raise":
            raise ValueError(f"a bug in {name}")
        if kind == "memory":
            raise MemoryError
        if kind in {"block", "sleep"}:
            Path(file).with_suffix(HANGING).touch()
        while kind == "block":
            time.sleep(0.05)
        if kind == "sleep":
            return _never()
        return function(*arguments, **words)

    wrapper.__name__ = function.__name__
    return wrapper


async def _never() -> None:
    import trio  # noqa: PLC0415 - not before the worker itself does

    await trio.sleep_forever()


def _told(file: str, name: str) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        target, _, kind = os.read(descriptor, 100).decode().partition(" ")
    finally:
        os.close(descriptor)
    return kind if target == name else ""


