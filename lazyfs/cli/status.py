"""
`lazyfs status`: everything about this node on one screen, once or again and again.

Layer: cli; draws what node.observing tells. `lazyfs daemon status` is the question whether the daemon is ready (its
exit code says so); this one answers what it is doing.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.mirror_status import ask_mirror
from lazyfs.cli.mirror_status import lines_of as mirror_lines
from lazyfs.cli.output import format_bytes, printable
from lazyfs.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.cli.workers import Answer

_MOUNTS_SHOWN = 40
_FAILURES = {"INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "UNKNOWN"}    # the others are containerd's ordinary life
_EPILOG = """\b
Examples:
  lazyfs status
  lazyfs status --watch           again every two seconds, until ^C
  lazyfs status --json            all that the workers tell
"""


@click.command("status", epilog=_EPILOG, short_help="Show what the node is doing: reads, sources, cache, mounts.")
@click.option("--watch", "-w", is_flag=True, help="Show it again and again, until ^C.")
@click.option("--interval", type=click.FloatRange(0.2, 3600), default=2.0, show_default=True, metavar="SECONDS",
              help="How often, with --watch.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch an object a line.")
def status_command(*, watch: bool, interval: float, as_json: bool) -> None:
    """
    Show what this node is doing.

    The daemon, or the workers of `lazyfs mount`; reads and what they waited for; the bytes that came and from whom;
    which source is down, since when and why; the cache; every mount. Exit code 0: somebody answered.
    """
    if not watch:
        _show_once(_ask(), as_json=as_json)
        return
    if as_json or not sys.stdout.isatty():
        while True:
            _show_once(_ask(), as_json=as_json, indent=None)
            sys.stdout.flush()
            time.sleep(interval)
    _watch(interval)


def _ask() -> list[Answer]:
    """Raises TargetError: there is nobody."""
    from lazyfs.cli.workers import ask_all  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.protocol import STATUS  # noqa: PLC0415

    answers = ask_all(STATUS)
    if not answers:
        raise TargetError("nothing is mounted, and no daemon runs on this node", hint="start it: lazyfs daemon")
    return answers


def _show_once(answers: list[Answer], *, as_json: bool, indent: int | None = 2) -> None:
    if as_json:
        workers = [{"daemon": one.daemon, "run_dir": str(one.directory.root), "reason": one.reason,
                    **(one.found or {"ready": False})} for one in answers]
        print(json.dumps({"time": time.time(), "workers": workers, "mirror": ask_mirror()}, indent=indent))
    else:
        print("\n".join(_screen(answers)))


def _screen(answers: list[Answer]) -> list[str]:
    """All of the node: its workers, and the mirror, which is a process of its own."""
    return [*lines_of(answers), *map(printable, mirror_lines(ask_mirror()))]


def _watch(interval: float) -> None:
    from rich.console import Console  # noqa: PLC0415 - 50 ms
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    with Live(console=Console(highlight=False, markup=False), screen=True, auto_refresh=False) as live:
        while True:
            try:
                lines = _screen(_ask())
            except TargetError as error:   # it may come back
                lines = [str(error)]
            live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(interval)


# --- what is shown ----------------------------------------------------------------------------------------------------


def lines_of(answers: list[Answer]) -> list[str]:
    """The screen."""
    found: list[str] = []
    for one in answers:
        found += [""] if found else []
        if one.found is None:
            found.append(f"daemon at {one.directory.root}: its worker does not answer: {one.reason}")
        else:
            found += _worker(one.found, is_daemon=one.daemon)
    return [printable(line) for line in found]


def _worker(told: dict[str, Any], *, is_daemon: bool) -> Iterator[str]:
    yield _who(told, is_daemon=is_daemon)
    yield _cache(told)
    for trouble in told["cache"].get("trouble", ()):
        yield f"  trouble   {trouble['what']}: {trouble['why']}, since {_since(trouble['since'], told['time'])}"
    yield from _reads(told)
    yield from _sources(told)
    yield from _peers(told)
    yield from _snapshotter(told)
    yield from _mounts(told)


def _who(told: dict[str, Any], *, is_daemon: bool) -> str:
    state = "ready" if told["ready"] else "not ready"
    worker = f"worker {told['pid']} for {_span(told['time'] - told['started'])}"
    keeper = told.get("keeper")
    if not is_daemon:
        return f"lazyfs {told['version']}: {worker}, without a daemon; {state}"
    if keeper is None:
        return f"lazyfs {told['version']} daemon: {worker}; its keeper does not answer; {state}"
    turns = max(0, keeper["turns"] - 1)
    return (f"lazyfs {told['version']} daemon: keeper {keeper['keeper']} for {_span(told['time'] - keeper['since'])}, "
            f"{worker}; {turns} takeovers, {keeper.get('died', 0)} deaths, {keeper.get('hung', 0)} hangs; {state}")


def _cache(told: dict[str, Any]) -> str:
    space, disk, evicted = told["space"], told.get("disk"), told["evicted"]
    parts = [format_bytes(space["used_bytes"])
             + (f" of {format_bytes(space['quota_bytes'])}" if space["quota_bytes"] else "")]
    if disk is not None:
        parts.append(f"{format_bytes(disk['free_bytes'])} of the disk free, {format_bytes(space['floor_bytes'])} "
                     "to stay so")
    if evicted["devices"]:
        parts.append(f"{evicted['devices']} devices evicted, {format_bytes(evicted['bytes'])}")
    damaged = told["cache"].get("chunks_damaged", 0) + told["cache"].get("chunks_unreadable", 0)
    parts += [f"{damaged} damaged chunks dropped"] if damaged else []
    return f"  cache     {told['cache_dir']}: {', '.join(parts)}"


def _reads(told: dict[str, Any]) -> Iterator[str]:
    minute, reads = told["minute"], told["reads"]
    count, seconds = minute["hits"] + minute["misses"], minute["seconds"]
    share = f", {minute['hits'] / count:.1%} from the cache" if count else ""
    yield f"  reads     {count / seconds:.1f}/s{share} (last {_span(seconds)})"
    waiting = f"{reads['waiting']} wait"
    if reads["waiting"]:
        waiting += f", the oldest for {reads['oldest_s']:.1f} s; {reads['hung']} for more than {reads['hung_s']:g} s"
    slow = f"; {reads['slow']} took {reads['slow_s']:g} s or longer: lazyfs trace" if reads["slow"] else ""
    yield f"            {waiting}{slow}"
    fetched = minute["fetched_stored_bytes"] / seconds
    by = [f"{name.removeprefix('source ')} {format_bytes(round(number / seconds))}/s"
          for name, number in minute.items() if name.startswith("source ") and number]
    yield f"  fetched   {format_bytes(round(fetched))}/s" + (f": {', '.join(by)}" if by else "")
    errors = {kind: number for kind, number in told["errors_lately"].items() if kind != "seconds"}
    if errors:
        words = ", ".join(f"{kind.replace('_', ' ')} {number}" for kind, number in sorted(errors.items()))
        yield f"  errors    {words} (last {_span(told['errors_lately']['seconds'])})"


def _sources(told: dict[str, Any]) -> Iterator[str]:
    title = "sources"
    for one in sorted(told.get("sources", ()), key=lambda one: one["source"]):
        line = f"  {title:<9} {one['source']}: {one['state']}"
        if one["state"] != "ok":
            since = f" since {_since(one['since'], told['time'])}" if one.get("since") else ""
            line += f"{since}: {one['why']}" if one.get("why") else since
        yield line
        title = ""
    for one in told.get("servers", ()):
        if one["state"] != "ok":    # a mirror: the reads go on without it
            since = f" since {_since(one['since'], told['time'])}" if one.get("since") else ""
            yield f"  {title:<9} server {one['server']}: {one['state']}{since}: {one['why']}"
            title = ""


def _peers(told: dict[str, Any]) -> Iterator[str]:
    peers = told.get("peers")
    if peers is None:
        return
    if peers["why"]:
        yield f"  peers     none: {peers['why']}"
        return
    membership = peers["membership"]
    away = sum(bool(one["away"]) for one in peers["peers"])
    lost = f"; {membership['kind']} lost for {_span(membership['lost_s'])}" if membership["lost_s"] else ""
    yield (f"  peers     {membership['members']} members of {peers['cluster']}{lost}; "
           f"{format_bytes(told['fetch']['peer_bytes'])} came, {format_bytes(peers['uploads']['bytes'])} went"
           + (f"; {away} left alone: lazyfs peers" if away else ""))


def _snapshotter(told: dict[str, Any]) -> Iterator[str]:
    report = told.get("snapshotter")
    if report is None:
        return
    count = sum(one["count"] for one in report["ended"])
    failed = sum(one["count"] for one in report["ended"] if one["code"] in _FAILURES)
    yield (f"  snapshotter  {count} calls answered, {failed} failed, {report['running']} under way; as of "
           f"{_span(told['time'] - report['time'])} ago")


def _mounts(told: dict[str, Any]) -> Iterator[str]:
    copies = {one["target"]: one for one in told["copying"]["copies"]}
    yield f"  mounts    {len(told['mounts'])}" + (f", {len(told['broken'])} broken" if told["broken"] else "")
    for mount in told["mounts"][:_MOUNTS_SHOWN]:
        notes = ["complete"] if mount["complete"] else [f"{_share(copies.get(mount['target']))} here"]
        copy = copies.get(mount["target"], {})
        if not mount["complete"] and copy.get("state") not in {None, "off"}:
            rate = f" {format_bytes(copy['rate_bytes_s'])}/s" if copy["rate_bytes_s"] else ""
            notes.append(f"copy: {copy['state']}{rate}" + (f" ({copy['reason']})" if copy["reason"] else ""))
        notes += ["detached"] if mount["detached"] else []
        yield f"            {mount['target']}  {mount['image']}  {mount['driver']}, {', '.join(notes)}"
    if len(told["mounts"]) > _MOUNTS_SHOWN:
        yield f"            and {len(told['mounts']) - _MOUNTS_SHOWN} more"
    for broken in told["broken"]:
        yield f"  broken    {broken['target']}  {broken['image']}: {broken['reason']}"


def _share(copy: dict[str, Any] | None) -> str:
    if copy is None or not copy["total_bytes"]:
        return "?"
    return f"{copy['present_bytes'] / copy['total_bytes']:.0%}"


def _since(when: float, now: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(when))} ({_span(now - when)})"


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
