"""
A link of 1 Gbit/s, or less: a network namespace behind a veth pair, shaped by TBF both ways.

What is inside the namespace is reached at `address`; every byte between it and this machine crosses the pair and is
counted at this machine's end. Kernel doc: tc-tbf(8), veth(4). Checked against known transfers by
tests/mount/test_demo_kit.py: TSO's large packets are counted once, with one header, so the count is the bytes of the
streams plus a little, never less than what was sent.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.kit.proc import ToolError, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.kit.workspace import Workspace

RATE_BIT_S = 1_000_000_000
# 256 KiB: more than one 64 KiB TSO packet (TBF drops or splits what exceeds the bucket), 2 ms at full rate.
_BURST_BYTES = 256 * 1024
_LATENCY_MS = 20  # of queue before TBF drops: about a switch's buffer at this rate
_POOL = ipaddress.ip_network("198.18.0.0/15")  # RFC 2544: reserved for benchmarks
_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class Link:
    """A running link; `netns` is the name to start servers in, `address` the one to reach them at."""

    netns: str
    address: str
    device: str

    def bytes_total(self) -> int:
        """Bytes that crossed the link since it was made, both ways."""
        folder = Path("/sys/class/net", self.device, "statistics")
        return sum(int((folder / name).read_text()) for name in ("rx_bytes", "tx_bytes"))

    def inside(self) -> list[str]:
        """Words to put before a command that is to run at the far end."""
        return ["ip", "netns", "exec", self.netns]

    def reach(self, call: Callable[[], bool]) -> bool:
        """Call it: `address` is reached from here."""
        return call()

    def set_rate(self, bit_s: int) -> None:
        """Make it another rate, both ways. Raises ToolError."""
        for words, device in (([], self.device), (self.inside(), f"{self.netns}n")):
            run([*words, "tc", "qdisc", "replace", "dev", device, "root", *_shape(bit_s)], timeout_s=_TIMEOUT_S)


def make_link(place: Workspace) -> Link:
    """
    Make the workspace's link; it goes with the workspace.

    Raises:
        ToolError: the kernel lacks network namespaces, veth or TBF, or no address is free.

    """
    netns, outer, inner = place.net_name, f"{place.net_name}h", f"{place.net_name}n"
    here, there = _free_pair()
    inside = ["ip", "netns", "exec", netns]
    shape = _shape(RATE_BIT_S)
    for command in (
        ["ip", "netns", "add", netns],
        ["ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", netns],
        ["ip", "address", "add", f"{here}/30", "dev", outer],
        ["ip", "link", "set", outer, "up"],
        [*inside, "ip", "address", "add", f"{there}/30", "dev", inner],
        [*inside, "ip", "link", "set", inner, "up"],
        [*inside, "ip", "link", "set", "lo", "up"],
        ["tc", "qdisc", "add", "dev", outer, "root", *shape],
        [*inside, "tc", "qdisc", "add", "dev", inner, "root", *shape],
    ):
        run(command, timeout_s=_TIMEOUT_S)
    return Link(netns, there, outer)


def _shape(bit_s: int) -> list[str]:
    return ["tbf", "rate", str(bit_s), "burst", str(_BURST_BYTES), "latency", f"{_LATENCY_MS}ms"]


def _free_pair() -> tuple[str, str]:
    """Two addresses of a /30 that no interface and no route here uses."""
    shown = run(["ip", "-4", "-o", "address"], timeout_s=_TIMEOUT_S).stdout
    used = [ipaddress.ip_interface(line.split()[3]).network for line in shown.splitlines() if len(line.split()) > 3]
    for block in _POOL.subnets(new_prefix=30):
        if not any(block.overlaps(other) for other in used):
            hosts = list(block.hosts())
            return str(hosts[0]), str(hosts[1])
    raise ToolError(f"no free /30 in {_POOL}")
