"""
A rack of machines: network namespaces, each with a veth pair to a bridge in a namespace of its own, shaped by TBF.

Nothing of it is in the network of this machine. Commands enter by nsenter, not by `ip netns exec`, whose copy of all
mounts would keep lazy mounts alive and hide new ones. Used by benchmarks.kit.cluster, for rows and tests of peers.
"""

from __future__ import annotations

import ctypes
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from benchmarks.kit.proc import attempt, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_BURST_BYTES = 128 * 1024            # more than one 64 KiB packet of TSO; 5 ms at 200 Mbit/s
_LATENCY_MS = 50                     # of queue before TBF drops: about a switch's buffer
_TIMEOUT_S = 30.0
_NETWORK = "198.18.0"                # RFC 2544; in these namespaces only
_NOBODY = "02:00:00:00:00:01"        # an address that no machine has: what is sent there vanishes
_CLONE_NEWNET = 0x40000000           # linux/sched.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Machine:
    """One of a rack: as benchmarks.kit.registry.Spot."""

    space: str                       # its namespace's name
    address: str

    def inside(self) -> list[str]:
        """Words before a command that is to run there; mounts are those of this process."""
        return ["nsenter", f"--net=/run/netns/{self.space}", "--"]

    def reach(self, call: Callable[[], _T]) -> _T:
        """Call it in this machine's network, in a thread of its own. Raises what it raises."""
        def enter() -> _T:
            with Path("/run/netns", self.space).open("rb") as file:
                if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), f"setns {self.space}")
            return call()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(enter).result()


@dataclass(frozen=True, slots=True)
class Counted:
    """Bytes that a machine has sent and received."""

    sent: int
    received: int


class Rack:
    """Machines by name. `prefix` begins the namespaces' names (of a Workspace: its net_name, so that it cleans up)."""

    def __init__(self, prefix: str, names: Sequence[str]) -> None:
        self.prefix = prefix
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._hub = f"{prefix}-hub"

    def __enter__(self) -> Self:
        """Raises ToolError: the kernel lacks namespaces, veth or a bridge."""
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for space in (*(self[name].space for name in self._numbers), self._hub):
            if Path("/run/netns", space).exists():
                attempt(["ip", "netns", "delete", space])

    def _make(self) -> None:
        spaces = [self._hub, *(self[name].space for name in self._numbers)]
        _batch([], [f"netns add {space}" for space in spaces])
        _batch(["-n", self._hub], ["link add hub type bridge", "link set hub up", "link set lo up"])
        for name, number in self._numbers.items():
            pair = f"link add eth0 netns {self[name].space} type veth peer name m{number} netns {self._hub}"
            _batch([], [pair])
            _batch(["-n", self[name].space],
                   [f"address add {self[name].address}/24 dev eth0", "link set eth0 up", "link set lo up"])
        ports = [f"m{number}" for number in self._numbers.values()]
        _batch(["-n", self._hub], [f"link set {port} master hub up" for port in ports])

    def __getitem__(self, name: str) -> Machine:
        return Machine(f"{self.prefix}-{name}", f"{_NETWORK}.{self._numbers[name]}")

    def shape(self, name: str, bit_s: int, up_bit_s: int = 0) -> None:
        """Its link's rate, down and up (0: the same). Raises ToolError."""
        for words, device, rate in ((["-n", self._hub], f"m{self._numbers[name]}", bit_s),
                                    (["-n", self[name].space], "eth0", up_bit_s or bit_s)):
            run(["tc", *words, "qdisc", "replace", "dev", device, "root", "tbf", "rate", str(rate), "burst",
                 str(_BURST_BYTES), "latency", f"{_LATENCY_MS}ms"], timeout_s=_TIMEOUT_S)

    def cut(self, name: str) -> None:
        """Pull its cable: packets vanish, nobody is told."""
        run(["ip", "-n", self._hub, "link", "set", f"m{self._numbers[name]}", "down"], timeout_s=_TIMEOUT_S)

    def join(self, name: str) -> None:
        """Put it back."""
        run(["ip", "-n", self._hub, "link", "set", f"m{self._numbers[name]}", "up"], timeout_s=_TIMEOUT_S)

    def part(self, one: str, other: str) -> None:
        """Nothing passes between these two any more, and nobody is told. Raises ToolError."""
        for near, far in ((one, other), (other, one)):
            run(["ip", "-n", self[near].space, "neighbour", "replace", self[far].address, "dev", "eth0", "lladdr",
                 _NOBODY, "nud", "permanent"], timeout_s=_TIMEOUT_S)

    def counted(self) -> dict[str, Counted]:
        """Of each machine, as the bridge has seen it: headers included."""
        text = run(["ip", "-n", self._hub, "-s", "-j", "link"], timeout_s=_TIMEOUT_S).stdout
        found = {entry["ifname"]: entry["stats64"] for entry in json.loads(text) if "stats64" in entry}
        return {name: Counted(found[f"m{number}"]["rx"]["bytes"], found[f"m{number}"]["tx"]["bytes"])
                for name, number in self._numbers.items()}


def _batch(words: Sequence[str], lines: Iterable[str]) -> None:
    run(["ip", *words, "-batch", "-"], stdin="\n".join(lines) + "\n", timeout_s=_TIMEOUT_S)
