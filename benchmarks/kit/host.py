"""This machine: what it is, and its page cache."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from benchmarks.kit.proc import ToolError, run

_TOOLS = {
    "containerd": ["containerd", "--version"],
    "runc": ["runc", "--version"],
    "skopeo": ["skopeo", "--version"],
    "docker-registry": ["docker-registry", "--version"],
    "mkfs.erofs": ["mkfs.erofs", "-V"],
}


def drop_page_cache() -> None:
    """Write what is dirty, then forget clean pages, dentries and inodes of the whole machine."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def describe() -> dict[str, str]:
    """Processor, memory, kernel and the versions of the tools measured."""
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    facts = {
        "cpu": f"{os.cpu_count()} x {cpu[1] if cpu else platform.machine()}",
        "memory_gib": f"{int(memory[1]) / (1 << 20):.1f}" if memory else "?",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "system": _pretty_name(),
    }
    for name, words in _TOOLS.items():
        try:
            found = re.search(r"\d+\.\d[\w.~+-]*", run(words, timeout_s=20).stdout)
        except (ToolError, OSError):
            continue
        facts[name] = found[0] if found else "?"
    return facts


def commit() -> str:
    """The checkout's commit, with `+` when files differ from it; `?` outside of one."""
    top = Path(__file__).resolve().parents[2]
    try:
        head = run(["git", "-C", top, "rev-parse", "--short=12", "HEAD"], timeout_s=20).stdout.strip()
        dirty = run(["git", "-C", top, "status", "--porcelain", "--untracked-files=no"], timeout_s=60).stdout.strip()
    except (ToolError, OSError):
        return "?"
    return head + ("+" if dirty else "")


def _pretty_name() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return "?"
