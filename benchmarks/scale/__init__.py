"""
The peers' real code (topology, swarm, limits) on trio's MockClock and a network in memory, with thousands of nodes.

`python -m benchmarks.scale --nodes 500`. network: time, links; node: what a node does; cluster: many, and their fate;
result: what came of it. The rows of `scripts/bench --suite peers` and tests/unit/test_scale.py call `run`.
"""
