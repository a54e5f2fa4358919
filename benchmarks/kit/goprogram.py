"""Our small Go programs of benchmarks/go, built when they are first needed, outside of the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from benchmarks.kit.proc import run

_SOURCES = Path(__file__).resolve().parents[1] / "go"
_FOLDER = "/var/tmp/lazyfs-go/benchmarks"
_BUILD_TIMEOUT_S = 900.0


def missing_go() -> str | None:
    """Why nothing can be built; None: it can."""
    return None if shutil.which("go") else "there is no Go to build it with"


def go_program(name: str) -> Path:
    """
    The built program; $LAZYFS_BENCH_GO_DIR says where it goes.

    Named after its sources, so that a change of them builds another one. Raises ToolError.
    """
    folder = _SOURCES / name
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.iterdir()))).hexdigest()[:12]
    target = Path(os.environ.get("LAZYFS_BENCH_GO_DIR", _FOLDER), f"{name}-{key}")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        run(["go", "build", "-trimpath", "-ldflags=-s -w", "-o", part, "."], timeout_s=_BUILD_TIMEOUT_S, cwd=folder)
        part.rename(target)
    return target
