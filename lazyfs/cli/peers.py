"""
`lazyfs peers`: who this node shares chunks with, how well that goes, and whom it leaves alone.

Layer: cli; draws what node.peering tells.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.output import format_bytes, printable
from lazyfs.errors import TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SWARMS_SHOWN = 10
_DIGEST_CHARS = 19               # sha256: and 12 letters, as in other messages
_SHOWN = 50                      # of 10,000 members those that were dealt with most
_EPILOG = """\b
Examples:
  lazyfs peers
  lazyfs peers --all              every member that this node has dealt with
  lazyfs peers --json             all that the worker tells
"""


@click.command("peers", epilog=_EPILOG, short_help="Show with whom this node shares chunks, and how that goes.")
@click.option("--all", "show_all", is_flag=True, help=f"Every member, not only the {_SHOWN} dealt with most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def peers_command(*, show_all: bool, as_json: bool) -> None:
    """
    Show with whom this node shares chunks.

    How it is known to the others and how it knows them; what came from whom and went to others; who is slow, or is
    left alone, and why. Exit code 0: the daemon answered, and [peers] is configured.
    """
    told = _ask()
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for line in lines_of(told, None if show_all else _SHOWN):
        print(printable(line))


def _ask() -> dict[str, Any]:
    """Raises TargetError: there is no daemon, or it has no peers."""
    from lazyfs.cli.workers import ask_all  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.protocol import STATUS  # noqa: PLC0415

    daemon = next((one for one in ask_all(STATUS) if one.daemon), None)
    if daemon is None or daemon.found is None:
        raise TargetError("no daemon answers on this node" + (f": {daemon.reason}" if daemon else ""),
                          hint="start it: lazyfs daemon")
    if "peers" not in daemon.found:
        raise TargetError("this node's daemon has no peers",
                          hint="set peers.cluster, and peers.tracker, peers.static or peers.dns; docs/peers.md")
    found: dict[str, Any] = daemon.found["peers"]
    fetch = daemon.found["fetch"]
    return {**found, "from_peers_bytes": fetch["peer_bytes"], "from_registry_bytes": fetch["fetched_stored_bytes"]}


def lines_of(told: dict[str, Any], most: int | None) -> Iterator[str]:
    """The screen. `most`: members shown; None: all."""
    if told["why"]:
        yield f"cluster {told['cluster']}: without peers: {told['why']}"
        return
    membership = told["membership"]
    lost = f", lost for {membership['lost_s']:.0f} s: {membership['why']}" if membership["lost_s"] else ""
    zone = f" in zone {told['zone']}" if told["zone"] else ""
    yield (f"cluster {told['cluster']}: {told['id']} at {told['address']}{zone}"
           + ("" if told["listens"] else ", not listening"))
    network = f" of network {membership['network']}" if membership.get("network") else ""
    yield f"known by {membership['kind']}: {membership['members']} members{network}{lost}"
    if membership.get("isolated"):
        yield f"isolated for all: {', '.join(membership['isolated'][:20])}"
    yield from _traffic(told)
    yield from _shared(told["swarms"], None if most is None else _SWARMS_SHOWN)
    yield from _table(told["peers"], most)


def _traffic(told: dict[str, Any]) -> Iterator[str]:
    counters, sent = told["counters"], told["uploads"]
    yield (f"came: {format_bytes(told['from_peers_bytes'])} from peers, "
           f"{format_bytes(told['from_registry_bytes'])} from registries (compressed)")
    yield (f"gave: {format_bytes(sent['bytes'])} ({format_bytes(sent['wire_bytes'])} on the wire), "
           f"{sent['requests']} requests, {sent['refused']} refused as too many")
    yield (f"asked: {counters.get('requests', 0)} requests, {counters.get('hedges', 0)} hedged, "
           f"{format_bytes(counters.get('duplicate_bytes', 0))} came twice; "
           f"{len(told['swarms'])} swarms")
    tokens = told.get("tokens")
    if tokens:
        yield (f"tokens: {tokens['held']} held, {tokens['failed']} times none to be had; "
               f"of others {tokens['refused']} refused")
        for word, last in (("no token", tokens.get("last_failed")), ("refused", tokens.get("last_refused"))):
            if last:
                yield f"  {word}, {last['seconds_ago']:.0f} s ago: {last['why']}"


def _shared(swarms: dict[str, dict[str, int]], most: int | None) -> Iterator[str]:
    """What is shared, and by how many."""
    shown = sorted(swarms.items(), key=lambda one: (-one[1]["members"], one[0]))[:most]
    for key, swarm in shown:
        kind, _, digest = key.partition("/")
        yield f"  {kind} {digest[:_DIGEST_CHARS]}: {swarm['members']} members, {swarm['complete']} have all of it"
    if len(shown) < len(swarms):
        yield f"  and {len(swarms) - len(shown)} more: --all"


def _table(peers: list[dict[str, Any]], most: int | None) -> Iterator[str]:
    rows = sorted(peers, key=lambda one: (not one["away"], not one["slow"], -one["bytes"], one["id"]))
    shown = rows if most is None else rows[:most]
    if not shown:
        return
    cells = [("MEMBER", "ADDRESS", "ZONE", "BYTES", "MS/PIECE", "FAILED", "STATE"),
             *((one["id"], one["address"] or "-", one["zone"] or "-", format_bytes(one["bytes"]),
                f"{one['p50_s'] * 1000:.0f}" if one["pieces"] else "-", str(one["failures"]), _state(one))
               for one in shown)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    if len(shown) < len(rows):
        yield f"and {len(rows) - len(shown)} more: --all"


def _state(one: dict[str, Any]) -> str:
    if one["away"]:
        return f"left alone for {one['away_s']:.0f} s: {one['away']}: {one['last_error']}"
    return f"slow: {one['last_error']}" if one["slow"] else "ok"
