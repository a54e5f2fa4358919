"""
Ports for servers of tests, such that nobody else takes one between its choice and its use.

A port that the kernel chooses (bind to 0) is one of those that any connection of this machine may get in the next
moment, and so may the test beside us. These are below that range, and each pytest process has a block of its own: it
holds a socket in the abstract namespace that is called like the block, and that ends with the process. Imported by
conftest, so that this socket is there before the first test, and is no leak of it.
"""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _BLOCK_PORTS, _BLOCKS = 12_000, 250, 80      # up to 32,000; the kernel's own begin at 32,768


def _own_block() -> tuple[socket.socket, int]:
    held = socket.socket(socket.AF_UNIX)
    for number in range(_BLOCKS):
        block = (os.getpid() + number) % _BLOCKS
        try:
            held.bind(f"\0lazyfs-tests-ports-{block}")
        except OSError:
            continue
        return held, _FIRST + block * _BLOCK_PORTS
    raise RuntimeError("who holds 80 blocks of ports? ss -xl | grep lazyfs-tests-ports")


_held, _block = _own_block()
_next = itertools.cycle(range(_block, _block + _BLOCK_PORTS))


def free_port() -> int:
    """A port that nobody listens on, on any address; not one of the last 200 that were given."""
    for port in itertools.islice(_next, _BLOCK_PORTS):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"ports {_block} to {_block + _BLOCK_PORTS} are all in use")
