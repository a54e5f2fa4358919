"""
Wait until a service answers: `python -m benchmarks.kit.probe http|redis PORT`.

Says `go` when it begins to ask, and `ready` at the first good answer; then it ends. Run it in the service's network
(`ip netns exec`), and before the clock starts: so that its own start is in nobody's time.
"""

from __future__ import annotations

import socket
import sys
import time

_POLL_S = 0.003
_ANSWER_S = 1.0
_DEADLINE_S = 120.0
_TALK = {     # what is asked, and how the answer begins
    "http": (b"GET / HTTP/1.0\r\n\r\n", b"HTTP/1.1 200"),
    "redis": (b"PING\r\n", b"+PONG"),
}


def main() -> int:
    question, wanted = _TALK[sys.argv[1]]
    address = ("127.0.0.1", int(sys.argv[2]))
    print("go", flush=True)
    limit = time.monotonic() + _DEADLINE_S
    while time.monotonic() < limit:
        try:
            with socket.create_connection(address, timeout=_ANSWER_S) as client:
                client.sendall(question)
                with client.makefile("rb") as stream:
                    if stream.read(len(wanted)) == wanted:
                        print("ready", flush=True)
                        return 0
        except OSError:
            pass
        time.sleep(_POLL_S)
    return 1


if __name__ == "__main__":
    sys.exit(main())
