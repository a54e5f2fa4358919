"""`python -m benchmarks.scale --nodes 500 …`: simulate, and print what came of it."""

from __future__ import annotations

import sys
import time

from benchmarks.scale.cluster import simulate
from benchmarks.scale.setting import parse


def main() -> int:
    setting = parse()
    began = time.perf_counter()
    result = simulate(setting)
    print(f"{setting.nodes} nodes, {setting.image_mib} MiB in pieces of {setting.piece_kib} KiB, "
          f"{setting.node_mbit:g} Mbit/s, origin {setting.origin_mbit:g} Mbit/s")
    print("\n".join(result.lines()))
    print(f"({time.perf_counter() - began:.0f} s of this machine)")
    return 1 if result.unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
