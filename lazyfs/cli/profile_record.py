"""
`lazyfs profile record WHAT`: the prefetch list of what running containers have read, or read from now on.

Layer: cli; thin: the work is in lazyfs.runner and lazyfs.profile, imported inside the command. Nothing is started or
stopped; the mount's worker is asked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.errors import HostError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.profile.parts import Profile
    from lazyfs.runner.following import Following, Found
    from lazyfs.runner.waiting import Processes

_POLL_S = 0.25
_NAMES_SHOWN = 5
_PAGE_KIB = 4
_EPILOG = """\b
Examples:
  lazyfs profile record registry.example/web:lazy -o web.prefetch        what its containers have read so far
  lazyfs profile record 3f2a91c7 --for 30s --since-now --fine > web.prefetch
  lazyfs profile record /mnt/app --until-exit --recording -o app.json

\b
Without a stop rule it writes what is known now; with --since-now it goes on until ^C.
"""


@click.command("record", epilog=_EPILOG, short_help="List what running containers read.")
@click.argument("what", metavar="WHAT")
@click.option("--output", "-o", metavar="FILE", default="-", help="Where the list goes.  [default: standard output]")
@click.option("--container", metavar="ID", help="Only what this container read (or one whose id begins so).")
@click.option("--since-now", is_flag=True, help="Leave out what was read before.")
@click.option("--fine", is_flag=True, help="Meanwhile let the kernel read nothing ahead: exact, and slower for the "
              "program.")
@click.option("--for", "for_time", metavar="TIME", help="Go on for so long, for example 30s.")
@click.option("--until-exit", is_flag=True, help="Go on until the container ends, or the image is unmounted.")
@click.option("--until-port", type=click.IntRange(1, 65535), metavar="N",
              help="Go on until somebody listens on this TCP port in the container's network.")
@click.option("--recording", is_flag=True, help="Write the recording itself (JSON, with times and containers).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; needs --output.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors and warnings.")
def record_command(
    what: str, *, output: str, container: str | None, since_now: bool, fine: bool, for_time: str | None,
    until_exit: bool, until_port: int | None, recording: bool, as_json: bool, quiet: bool,
) -> None:
    """
    Write the prefetch list of what was read through a mount since it was made.

    WHAT is the directory of a mount, an image that is mounted (all its mounts, merged), or a container's id or the
    beginning of one. The program is not disturbed; ^C ends the recording, and the list is written.
    """
    from lazyfs.cli.mount import absolute_image  # noqa: PLC0415 - start-up time of --help
    from lazyfs.cli.profile_run import check_output  # noqa: PLC0415
    from lazyfs.runner.following import Following, find_mounts  # noqa: PLC0415
    from lazyfs.runner.rules import parse_duration  # noqa: PLC0415
    from lazyfs.runner.waiting import Processes  # noqa: PLC0415

    for_s = None if for_time is None else parse_duration(for_time)
    if as_json and output == "-":
        raise UsageError("--json and the list cannot both go to standard output", hint="add --output FILE")
    if os.geteuid() != 0:
        raise HostError("a worker tells only root what was read", hint="run it with sudo")
    check_output(output)
    found = [replace(one, container=container or one.container)
             for one in find_mounts(absolute_image(what, str(Path.cwd())))]
    if recording and len(found) > 1:
        targets = ", ".join(one.target for one in found[:_NAMES_SHOWN])
        raise UsageError(f"{what} is mounted {len(found)} times: {targets}",
                         hint="a recording is of one mount: name its directory")
    with contextlib.ExitStack() as stack:
        following = [stack.enter_context(Following(one, fine=fine)) for one in found]
        for one in following:
            if since_now:
                one.skip_past()
            else:
                one.poll()
        name = found[0].container
        rules = _Rules(for_s, until_exit, until_port, Processes(name) if name else None)
        if since_now or rules.any or fine:
            _follow(following, rules, quiet=quiet)
        _write(following, found, output, recording=recording, as_json=as_json, quiet=quiet)


class _Rules:
    """When it is over. `processes`: of the container that was named; None: none was."""

    def __init__(self, for_s: float | None, until_exit: bool, port: int | None, processes: Processes | None) -> None:
        self.any = for_s is not None or until_exit or port is not None
        self._end = None if for_s is None else time.monotonic() + for_s
        self._until_exit, self._port, self._processes = until_exit, port, processes

    def met(self) -> str:
        """Which one, in words; empty: none yet."""
        from lazyfs.runner.waiting import listens  # noqa: PLC0415

        if self._end is not None and time.monotonic() >= self._end:
            return "the time is over"
        pid = None if self._processes is None else self._processes.one()
        if self._processes is not None and pid is None:
            return "the container has ended"
        if self._port is not None and listens(pid, self._port):
            return f"port {self._port} is open"
        return ""


def _follow(following: list[Following], rules: _Rules, *, quiet: bool) -> None:
    """Until a rule is met, ^C, or all mounts are gone."""
    if not quiet:
        note(f"recording {', '.join(one.found.target for one in following[:_NAMES_SHOWN])}; ^C ends it")
    with _signals_end() as ended:
        reason = ""
        while not reason:
            alive = [one.poll() for one in following]
            reason = rules.met() if any(alive) else "the image was unmounted"
            if not reason and ended.wait(_POLL_S):
                reason = "interrupted"
        for one in following:
            one.poll()
    if not quiet:
        note(reason)


def _write(following: list[Following], found: list[Found], output: str, *, recording: bool, as_json: bool,
           quiet: bool) -> None:
    from lazyfs.image.prefetch import format_prefetch  # noqa: PLC0415
    from lazyfs.profile.files import profile_of_recording  # noqa: PLC0415
    from lazyfs.profile.merge import merge  # noqa: PLC0415
    from lazyfs.profile.parts import list_of  # noqa: PLC0415
    from lazyfs.profile.recording import to_json  # noqa: PLC0415

    recordings = [one.recording() for one in following]
    profile = merge([profile_of_recording(made, one.tables.files)
                     for made, one in zip(recordings, following, strict=True)])
    profile = replace(profile, header=replace(profile.header, image=found[0].image, tool=recordings[0].tool))
    write_output(output, to_json(recordings[0]).decode() if recording else format_prefetch(list_of(profile)))
    warnings = list(dict.fromkeys(line for one in following for line in _warnings(one)))
    for line in warnings:
        note(f"warning: {line}")
    if as_json:
        print_json(_report(following, profile, output, warnings))
    elif not quiet:
        note(f"{len(profile.parts)} ranges of files, {format_bytes(profile.size_bytes)}, of {found[0].image}")


def _warnings(one: Following) -> list[str]:
    """What the list may lack, or have too much."""
    target = one.found.target
    lines = []
    if not one.whole or one.gaps:
        lines.append(f"{target}: another worker took over: what was read before it did is not known")
    if one.unseen:
        lines.append(f"{target}: {len(one.unseen)} layers are in the cache as a whole, and read by the kernel alone: "
                     "what is read of them is not seen")
    if one.truncated:
        lines.append(f"{target}: more was read than is noted")
    if one.read_ahead_kib > _PAGE_KIB:
        lines.append(f"{target}: the kernel reads {one.read_ahead_kib} KiB ahead, which is listed as well (--fine)")
    return lines


def _report(following: list[Following], profile: Profile, output: str, warnings: list[str]) -> dict[str, Any]:
    """A contract: names are only added."""
    return {
        "image": profile.header.image,
        "list": output,
        "ranges": len(profile.parts),
        "fileBytes": profile.size_bytes,
        "mounts": [{"target": one.found.target, "containers": one.read_by, "whole": one.whole and not one.gaps,
                    "unseenLayers": len(one.unseen), "readAheadKib": one.read_ahead_kib, "truncated": one.truncated}
                   for one in following],
        "warnings": warnings,
    }


@contextlib.contextmanager
def _signals_end() -> Iterator[threading.Event]:
    """^C, SIGTERM and a closed terminal end the recording, not the command."""
    ended = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: ended.set()) for number in numbers]
    try:
        yield ended
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
