"""What is simulated: the words of `python -m benchmarks.scale`, as a value."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

MBIT = 1e6 / 8


@dataclass(frozen=True)
class Setting:
    """Shares are of the nodes, 0 to 1; which ones is drawn by `seed`."""

    nodes: int = 500
    image_mib: int = 200
    piece_kib: int = 1024
    node_mbit: float = 1000.0            # each way
    origin_mbit: float = 10_000.0
    work_mb: float = 0.0                 # MB/s that a node's processor receives and gives together; 0: no bound
    rtt_ms: float = 1.0
    origin_ms: float = 10.0              # from asking the registry to its first byte
    zones: int = 1
    zone_rtt_ms: float = 1.0             # between zones
    loss: float = 0.0                    # share of packets that are lost, at random (benchmarks.scale.loss)
    window: int = 64                     # pieces that a node wants at once
    in_order: int = 0                    # 1: as a program reads, by the window from the first that is missing
    hot_mib: int = 50                    # the part that a start needs
    spread_s: float = 0.0                # nodes begin within this
    dying: float = 0.0                   # share that dies while it fetches
    silent: float = 0.5                  # share of these whose machine vanishes; the others' connections break
    noticed_s: float = 10.0              # after which the tracker tells of a death
    liars: float = 0.0                   # give wrong bytes
    slow: float = 0.0                    # have a link of a tenth
    slow_disk: float = 0.0               # read what they give from a disk of a tenth of the link
    declared: int = 0                    # 1: each says in its up_rate what its link or disk is, as if found before
    limit_s: float = 600.0               # simulated
    seed: int = 1

    @property
    def ideal_s(self) -> float:
        return self.image_mib * (1 << 20) / (min(self.node_mbit, self.origin_mbit) * MBIT)


def parse(words: list[str] | None = None) -> Setting:
    """From the command line; every field is an option."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale",
                                     description="Simulate a cluster that fetches one image at once, by the real code.")
    for one in fields(Setting):
        kind = int if isinstance(one.default, int) else float
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=kind, default=one.default, metavar="N")
    return Setting(**vars(parser.parse_args(words)))
