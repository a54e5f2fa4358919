"""The mirror's part of `lazyfs status`: asked for at its own address, for it is a process of its own. Layer: cli."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any

from lazyfs.cli.output import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

_ANSWER_S = 2.0
_BYTES_MAX = 1 << 20


def ask_mirror() -> dict[str, Any] | None:
    """What it tells, or {"address", "why"} where it does not; None: this node is to have none."""
    from lazyfs import config  # noqa: PLC0415 - start-up time of --help
    from lazyfs.config import split_address  # noqa: PLC0415

    address = config.load().mirror.address
    if not address:
        return None
    connection = http.client.HTTPConnection(*split_address(address), timeout=_ANSWER_S)
    try:
        connection.request("GET", "/status")
        answer = connection.getresponse()
        found = json.loads(answer.read(_BYTES_MAX))
        if answer.status != 200 or not isinstance(found, dict):
            raise ValueError(f"status {answer.status}")   # noqa: TRY301 - as if it said something else
    except (OSError, http.client.HTTPException, ValueError) as error:
        return {"address": address, "why": f"does not answer: {error}"}
    finally:
        connection.close()
    return {"address": address, "why": "", **found}


def lines_of(told: dict[str, Any] | None) -> Iterator[str]:
    """Of the screen."""
    if told is None:
        return
    if told["why"]:
        yield f"mirror    {told['address']} {told['why']}"
        return
    sent, requests = told["sent_bytes"], told["requests"]
    by = ", ".join(f"{name} {format_bytes(count)}" for name, count in sorted(sent.items()) if count)
    yield (f"mirror    {told['address']}: {sum(requests.values())} requests, {requests.get('none', 0)} not served or "
           f"without a body; sent {by or 'nothing'}")
    fetched, mended = told["fetched_bytes"], told["wrong_pieces"]["mended"]
    yield (f"          fetched {format_bytes(fetched['peers'])} from peers, {format_bytes(fetched['registry'])} from "
           f"registries" + (f"; {mended} wrong pieces mended" if mended else ""))
    yield from _peers(told["peers"])


def _peers(peers: dict[str, Any] | None) -> Iterator[str]:
    if peers is None:
        return
    if peers["why"]:
        yield f"          without peers: {peers['why']}"
        return
    membership = peers["membership"]
    lost = f"; {membership['kind']} lost for {membership['lost_s']:.0f} s" if membership["lost_s"] else ""
    lied = f"; gave wrong bytes: {', '.join(peers['lied'][:8])}" if peers["lied"] else ""
    yield (f"          {membership['members']} members of {peers['cluster']}{lost}; "
           f"{format_bytes(peers['uploads']['bytes'])} went to others{lied}")
