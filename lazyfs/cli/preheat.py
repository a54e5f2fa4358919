"""`lazyfs preheat`: have nodes of the cluster fetch an image before it is needed. Thin; see tracker.preheat."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from lazyfs import config
from lazyfs.cli.output import format_bytes, note, print_json, printable
from lazyfs.errors import LazyfsError, SourceError, UsageError

if TYPE_CHECKING:
    from lazyfs.config import Config

_POLL_S = 1.0
_TRACKER_GONE_S = 120.0          # a tracker that restarts: the job goes on meanwhile
_SHOWN_COUNT_MAX = 20
_EPILOG = """\b
Examples:
  lazyfs preheat registry.example/app:lazy --wait           every node
  lazyfs preheat registry.example/app:1 --percent 10        a tenth; the others fetch from those
  lazyfs preheat registry.example/app:lazy --zone z1 --nodes 3
  lazyfs preheat https://files.example/model.bin --wait --json

\b
Lazy images go into the cache (as lazyfs cache fetch), ordinary ones and files into the mirror.
"""


@click.command("preheat", epilog=_EPILOG, short_help="Have nodes of the cluster fetch an image ahead.")
@click.argument("source", metavar="IMAGE|URL")
@click.option("--nodes", type=click.IntRange(1, 100_000), metavar="N", help="So many nodes.  [default: all]")
@click.option("--percent", type=click.FloatRange(0, 100, min_open=True), metavar="P", help="So many of a hundred.")
@click.option("--zone", default="", metavar="NAME", help="Only nodes there.")
@click.option("--platform", default="", metavar="OS/ARCH", help="Which image of an index.  [default: each node's own]")
@click.option("--cluster", metavar="NAME", help="Which cluster.  [default: configured]")
@click.option("--tracker", "trackers", multiple=True, metavar="URL", help="Whom to ask.  [default: configured]")
@click.option("--timeout", "seconds", type=click.FloatRange(1, 86400), default=1800.0, show_default=True, metavar="S",
              help="A node that is not done by then has failed.")
@click.option("--wait/--no-wait", default=False, help="Return when all nodes are done, or at once.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def preheat_command(source: str, *, nodes: int | None, percent: float | None, zone: str, platform: str,
                    cluster: str | None, trackers: tuple[str, ...], seconds: float, wait: bool, as_json: bool) -> None:
    """
    Have nodes fetch all of an image, or a file, before somebody needs it.

    Each node uses its own credentials. With --wait the exit code says whether all of them have it.
    """
    import trio  # noqa: PLC0415 - start-up time of --help

    if nodes is not None and percent is not None:
        raise UsageError("--nodes and --percent: expected one of them")
    settings = _with(config.load(), cluster, trackers)
    order = {"source": source, "kind": "file" if source.startswith(("http://", "https://")) else "image",
             "nodes": nodes or 0, "percent": percent or 100.0, "zone": zone, "platform": platform, "seconds": seconds}
    found = trio.run(_run, settings, order, wait, as_json)
    if as_json:
        print_json(found)
    elif not wait and found["count"]:
        note(f"job {found['id']}: {found['count']} nodes; lazyfs preheat ... --wait shows how it goes")
    if found["state"] == "FAILURE":
        _tell_failed(found, quiet=as_json or wait)
        why = f"{found['failed']} of {found['count']} nodes have failed" if found["count"] else found["problem"]
        raise SourceError(f"{printable(source.partition('?')[0])}: {printable(why)}", transient=False,
                          hint="lazyfs peers shows who is in the cluster; docs/preheat.md")


async def _run(settings: Config, order: dict[str, Any], wait: bool, quiet: bool) -> dict[str, Any]:
    import msgspec  # noqa: PLC0415
    import trio  # noqa: PLC0415

    from lazyfs.peers.tracked import tracker_client  # noqa: PLC0415

    client = tracker_client(settings.peers)
    path = f"/v1/clusters/{settings.peers.cluster}/preheat"
    try:
        made = msgspec.json.decode((await client.request("POST", path, msgspec.json.encode(order))).body)
        shown, deadline = "", time.monotonic() + _TRACKER_GONE_S
        ended: set[str] = set()
        while True:
            try:
                found: dict[str, Any] = msgspec.json.decode((await client.request("GET", f"{path}/{made['id']}")).body)
                deadline = time.monotonic() + _TRACKER_GONE_S
            except LazyfsError:
                if time.monotonic() > deadline:
                    raise
            else:
                if wait and not quiet:
                    _show_ended(found["nodes"], ended)
                shown = _show(found, shown, quiet=quiet or not wait)
                if not wait or found["state"] != "PENDING":
                    return found
            await trio.sleep(_POLL_S)
    finally:
        await client.aclose()


def _show(found: dict[str, Any], shown: str, *, quiet: bool) -> str:
    states = [one["state"] for one in found["nodes"]]
    line = (f"{states.count('done')} of {found['count']} nodes have it, {states.count('failed')} failed; "
            f"{format_bytes(sum(one['done'] for one in found['nodes']))} of "
            f"{format_bytes(sum(one['total'] for one in found['nodes']))}")
    if line != shown and not quiet:
        note(line)
    return line


def _show_ended(nodes: list[dict[str, Any]], ended: set[str]) -> None:
    """A line for each node that has it, or will not have it, since the last look. `ended`: of whom that was said."""
    for one in nodes:
        if one["state"] == "running" or one["node"] in ended:
            continue
        ended.add(one["node"])
        if len(ended) <= _SHOWN_COUNT_MAX:
            end = f"has it, {format_bytes(one['done'])}" if one["state"] == "done" else printable(one["error"])
            note(f"{printable(one['node'])}: {end}")


def _tell_failed(found: dict[str, Any], *, quiet: bool) -> None:
    failed = [one for one in found["nodes"] if one["state"] == "failed"]
    for one in failed[:0 if quiet else _SHOWN_COUNT_MAX]:
        note(f"{printable(one['node'])}: {printable(one['error'])}")


def _with(settings: Config, cluster: str | None, trackers: tuple[str, ...]) -> Config:
    """Raises UsageError: nobody says which cluster, or whom to ask."""
    import dataclasses  # noqa: PLC0415

    from lazyfs.peers.announce import CLUSTER  # noqa: PLC0415 - start-up time of --help

    peers = dataclasses.replace(settings.peers, cluster=cluster or settings.peers.cluster,
                                tracker=trackers or settings.peers.tracker)
    if cluster is not None and CLUSTER.fullmatch(cluster) is None:
        raise UsageError(f"--cluster {cluster!r:.140}: expected letters, digits, dot, dash, underscore")
    if not peers.cluster or not peers.tracker:
        raise UsageError("which cluster, and which tracker?",
                         hint="[peers] cluster and tracker in the configuration, or --cluster and --tracker")
    return dataclasses.replace(settings, peers=peers)
