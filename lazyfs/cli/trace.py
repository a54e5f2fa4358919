"""
`lazyfs trace`: reads that were slow, and why: which file, which chunks, how long in each stage, from whom.

Layer: cli; thin over what node.observing tells. Files are found here, out of the bootstrap in the cache: the worker
knows ranges only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.output import format_bytes, note, printable
from lazyfs.errors import LazyfsError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.profile.files import ImageFiles

_POLL_S = 0.5
_FILES_SHOWN = 3
_EPILOG = """\b
Examples:
  lazyfs trace                    the slow reads that the workers remember, and those that wait now
  lazyfs trace --follow           then each one as it ends
  lazyfs trace --over 5 --json    those of 5 s and more, an object a line
"""


@click.command("trace", epilog=_EPILOG, short_help="Show reads that were slow, and why.")
@click.option("--over", type=click.FloatRange(0), default=0.0, metavar="SECONDS", show_default="daemon.slow_read_s",
              help="Only those that took, or have waited, as long.")
@click.option("--follow", "-f", is_flag=True, help="Go on with those to come, until ^C.")
@click.option("--json", "as_json", is_flag=True, help="Print an object a line.")
def trace_command(*, over: float, follow: bool, as_json: bool) -> None:
    """
    Show reads of image data that were slow.

    A worker remembers the last 256 that took `daemon.slow_read_s` or longer. `queue` is what a chunk waited for its
    turn (tries that failed included), `first_byte` until the source answered, `transfer` until its bytes were there,
    then `decode` and `store`. The request's id is in the worker's log, and in the registry's as X-Request-Id.
    """
    teller = _Teller(over, as_json=as_json)
    count = teller.tell_new(waiting=not follow)
    if not follow:
        if not count and not as_json:
            note("no slow read is remembered, and none waits")
        return
    while True:
        time.sleep(_POLL_S)
        teller.tell_new(waiting=False)


class _Teller:
    """What was told already. `over`: seconds."""

    def __init__(self, over: float, *, as_json: bool) -> None:
        self._over = over
        self._as_json = as_json
        self._told: dict[tuple[str, int], int] = {}      # of each worker, the number of its last read that we know
        self._files: dict[str, ImageFiles | None] = {}   # by target

    def tell_new(self, *, waiting: bool) -> int:
        """Tell of those that were not told yet, of all workers; returns how many. Raises TargetError: there is none."""
        from lazyfs.cli.workers import ask_all  # noqa: PLC0415
        from lazyfs.node.protocol import TRACE  # noqa: PLC0415

        count = 0
        answers = ask_all(TRACE, over=self._over)
        if not answers and not self._told:
            raise TargetError("nothing is mounted, and no daemon runs on this node")
        for answer in answers:
            if answer.found is None:
                continue
            worker = answer.directory.worker()
            key = (str(answer.directory.root), worker.pid if worker is not None else 0)
            for one in self._unknown(answer.found["reads"], key):
                count += self._tell(one)
            if waiting:
                over_s = self._over or answer.found["slow_s"]
                count += sum(self._tell(one) for one in answer.found["waiting"] if one["seconds"] >= over_s)
        sys.stdout.flush()
        return count

    def _unknown(self, reads: list[dict[str, Any]], key: tuple[str, int]) -> Iterator[dict[str, Any]]:
        for one in reads:
            if one["number"] > self._told.get(key, 0):
                self._told[key] = one["number"]
                yield one
        self._told.setdefault(key, 0)

    def _tell(self, one: dict[str, Any]) -> int:
        if one["seconds"] < self._over:
            return 0
        one["files"] = [{"path": path, "start": start, "end": end} for path, start, end in self._files_of(one)]
        if self._as_json:
            print(json.dumps(one, ensure_ascii=True))
        else:
            print("\n".join(lines_of(one)))
        return 1

    def _files_of(self, one: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
        target = one.get("target")
        if target is None:
            return
        if target not in self._files:
            self._files[target] = _load(target)
        files = self._files[target]
        if files is not None and one["device"] in files.digests:
            start = one["device_offset"]
            for path, low, high in files.files_in(one["device"], start, start + one["size"]):
                yield "/" + os.fsdecode(path), low, high


def _load(target: str) -> ImageFiles | None:
    """None: it is mounted no more, or its bootstrap cannot be read: then ranges of the device must do."""
    from lazyfs.runner.recording import MountedTables  # noqa: PLC0415

    try:
        return MountedTables.of(target).files
    except (LazyfsError, OSError) as error:
        note(f"{target}: files are not named: {error}")
        return None


def lines_of(one: dict[str, Any]) -> list[str]:
    """A read for people."""
    when = time.strftime("%H:%M:%S", time.localtime(one["time"])) if "time" in one else "now"
    state = f"failed: {one['error']}" if one["error"] else "" if one["over"] else "waits still"
    who = f"{one.get('process', '?')} ({one['pid']})" + (f" in {one['container'][:12]}" if one.get("container") else "")
    found = [f"{when}  {one['seconds']:.3f} s  {one.get('image', 'unmounted image')}  {who}  request {one['request']}"
             + (f"  {state}" if state else "")]
    files = [f"{file['path']} {file['start']}-{file['end']}" for file in one.get("files", ())]
    if files:
        more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
        found.append(f"    file {', '.join(files[:_FILES_SHOWN])}{more}")
    else:
        found.append(f"    {format_bytes(one['size'])} at {one['device_offset']} of device "
                     f"{one.get('device', '')[:19] or '?'}")
    found += [f"    {_chunk(chunk)}" for chunk in one["chunks"]]
    return [printable(line) for line in found]


def _chunk(chunk: dict[str, Any]) -> str:
    stages = ", ".join(f"{name.replace('_', ' ')} {seconds:.3f} s" for name, seconds in chunk["stages"].items())
    source = chunk["server"] or chunk["source"]
    parts = [f"chunk {chunk['chunk']} of {chunk['blob'][:19]}, {format_bytes(chunk['stored_bytes'])} from {source}: "
             + (stages or "not answered")]
    parts += ["it was on its way already"] if chunk["under_way"] else []
    parts += [f"{chunk['failed_tries']} tries failed"] if chunk["failed_tries"] else []
    parts += [] if chunk["landed"] else ["it did not come"]
    parts += [chunk["error"]] if chunk["error"] else []
    return "; ".join(parts)
