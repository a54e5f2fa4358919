"""
The go command, for benchmarks and tests; and our small Go programs of benchmarks/go.

These are built when they are first needed, outside of the checkout.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from benchmarks.kit.proc import ToolError, run

_SOURCES = Path(__file__).resolve().parents[1] / "go"
_FOLDER = "/var/tmp/lazyfs-go/benchmarks"
_BUILD_TIMEOUT_S = 900.0


def go_command() -> str | None:
    """The go command, also where its directory is not in PATH; None: there is none."""
    return shutil.which("go", path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/go/bin")


def missing_go() -> str | None:
    """Why nothing can be built; None: it can."""
    return None if go_command() else "there is no Go to build it with"


def go_program(name: str) -> Path:
    """
    The built program; $LAZYFS_BENCH_GO_DIR says where it goes.

    Named after its sources, so that a change of them builds another one. Raises ToolError.
    """
    folder = _SOURCES / name
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()[:12]
    target = Path(os.environ.get("LAZYFS_BENCH_GO_DIR", _FOLDER), f"{name}-{key}")
    if not target.exists():
        command = go_command()
        if command is None:
            raise ToolError(f"there is no Go to build {folder} with")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        run([command, "build", "-trimpath", "-ldflags=-s -w", "-o", part, "."], timeout_s=_BUILD_TIMEOUT_S, cwd=folder)
        part.rename(target)
    return target
