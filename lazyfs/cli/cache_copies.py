"""
What becomes of images that are not whole in the cache, for `lazyfs cache ls`: asked of the worker, in words.

Layer: cli. Who calls: cli.cache. Looking at a cache needs no worker: one that does not answer is as none.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from lazyfs.cli.cacheowner import ask_owner
from lazyfs.cli.output import format_bytes
from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from pathlib import Path

_ANSWER_S = 3.0
_REASON_CHARS_MAX = 60           # in a table; --json has all of it
_MEMBERS = {"state": "state", "reason": "reason", "since": "since", "present_bytes": "presentBytes",
            "total_bytes": "totalBytes", "rate_bytes_s": "rate"}


def ask_copies(path: Path) -> dict[str, dict[str, Any]]:
    """By the bootstrap's digest, as `ls --json` shows it; empty: no worker serves this directory, or none answers."""
    from lazyfs.node.protocol import COPIES  # noqa: PLC0415

    try:
        answer = ask_owner(path, COPIES, _ANSWER_S)
    except LazyfsError:
        answer = None
    if answer is None:
        return {}
    found = {one["bootstrap"]: one for one in answer["copies"]}
    found.update({one["bootstrap"]: one for one in answer["fetches"] if one["state"] in {"opening", "fetching"}})
    return {name: {theirs: one[ours] for ours, theirs in _MEMBERS.items()} for name, one in found.items()}


def copy_words(copy: dict[str, Any] | None) -> str:
    """One cell: what happens now, how quick, or why not and since when."""
    if copy is None or copy["state"] == "complete":
        return "-"
    state, reason = copy["state"], copy["reason"]
    if len(reason) > _REASON_CHARS_MAX:
        reason = reason[: _REASON_CHARS_MAX - 1] + "…"
    if state in {"copying", "fetching"}:
        return f"{state} {_share(copy)}, {format_bytes(copy['rate'])}/s"
    if state == "failed":
        return f"failed since {time.strftime('%H:%M:%S', time.localtime(copy['since']))}: {reason}"
    return f"{state} {_share(copy)}: {reason}" if state == "paused" else state + (f": {reason}" if reason else "")


def _share(copy: dict[str, Any]) -> str:
    return f"{copy['presentBytes'] / max(1, copy['totalBytes']):.0%}"
