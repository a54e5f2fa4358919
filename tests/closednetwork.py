"""
A network of its own, in which a registry tries to send us where it should not; run by
tests/fault/test_registry_reach.py as root in fresh network and mount namespaces: `python -m tests.closednetwork CASES
ADDRESSES`.

All addresses, public ones too, are on this namespace's loopback device. A name server says what each name stands for (a
list of addresses: one an answer, the last for ever). A registry listens on port 5000, on port 80 whatever is not to be
reached: every connection and every byte that comes there is written down.

CASES: JSON, a list of {"registry": host, "names": {name: [address, ...]}, "way": "redirect"|"realm", "url": ...,
"allow_private": bool, "reads": count}. Prints JSON, a list of {"error": text or "", "hint", "reached": [address, ...],
"secrets": count}.
"""

from __future__ import annotations

import json
import socket
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from lazyfs.errors import LazyfsError
from lazyfs.image.digest import Digest
from lazyfs.registry import RegistryOptions, open_source

BLOB = b"0123456789" * 10
MANIFEST = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"}).encode()
PASSWORD = "hunter2-planted"
_LINK = ["ip", "link", "set", "lo", "up"]
_A, _AAAA = 1, 28


class Now:
    """What the servers do now, and what they have seen."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.way = self.url = ""
        self.reached: list[str] = []
        self.secrets = 0


NOW = Now()


class Registry(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        authorized = "Authorization" in self.headers
        if NOW.way == "realm" and not authorized:
            self.answer(401, {"WWW-Authenticate": f'Bearer realm="{NOW.url}",service="x"'})
        elif "/blobs/" in self.path and NOW.way == "redirect":
            self.answer(307, {"Location": NOW.url})
        elif "/blobs/" in self.path:
            self.answer(206, {"Content-Range": f"bytes 0-9/{len(BLOB)}"}, BLOB[:10])
        else:
            self.answer(200, {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}, MANIFEST)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Elsewhere(Registry):
    """Blob store and token server. One request a connection: for the next one the name is asked for again."""

    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        NOW.secrets += "Authorization" in self.headers
        if self.path.startswith("/token"):
            self.answer(200, {}, b'{"token": "t"}')
        else:
            self.answer(206, {"Content-Range": f"bytes 0-9/{len(BLOB)}"}, BLOB[:10])


class Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6
    daemon_threads = True


class Recording(Server):
    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        NOW.reached.append(connection.getsockname()[0].removeprefix("::ffff:"))
        return connection, address


def answer_names(server: socket.socket) -> None:
    while True:
        question, sender = server.recvfrom(4096)
        server.sendto(answer_of(question), sender)


def answer_of(question: bytes) -> bytes:
    """RFC 1035: the question again, and at most one address."""
    labels, at = [], 12
    while question[at]:
        labels.append(question[at + 1 : at + 1 + question[at]].decode())
        at += 1 + question[at]
    kind = struct.unpack_from(">H", question, at + 1)[0]
    asked = question[12 : at + 5]
    known = NOW.names.get(".".join(labels).lower(), [])
    family = {_A: socket.AF_INET, _AAAA: socket.AF_INET6}.get(kind)
    fitting = known and family is not None and (":" in known[0]) == (kind == _AAAA)
    data = socket.inet_pton(family, known[0]) if fitting and family is not None else b""
    if fitting and len(known) > 1:
        known.pop(0)
    header = question[:2] + struct.pack(">HHHHH", 0x8180, 1, bool(data), 0, 0)
    record = struct.pack(">HHHIH", 0xC00C, kind, 1, 0, len(data)) + data if data else b""
    return header + asked + record


def run(case: dict[str, Any]) -> dict[str, Any]:
    NOW.names, NOW.way, NOW.url = case["names"], case["way"], case["url"]
    NOW.reached, NOW.secrets = [], 0
    options = RegistryOptions(insecure=True, username="kim", password=PASSWORD, retry_count=0, request_deadline_s=10.0,
                              allow_private=case.get("allow_private", False))
    source = open_source(f"{case['registry']}:5000/app:1", options)
    error = hint = ""
    try:
        source.root()
        for _ in range(case.get("reads", 1)):
            with source.read_range(Digest.of(BLOB), 0, 10, time.monotonic() + 10) as stream:
                assert stream.read(10) == BLOB[:10]
    except LazyfsError as caught:
        error, hint = str(caught), caught.hint
    finally:
        source.close()
    return {"error": error, "hint": hint, "reached": NOW.reached, "secrets": NOW.secrets}


def main() -> None:
    cases = json.loads(sys.argv[1])
    subprocess.run(_LINK, check=True)
    for address in json.loads(sys.argv[2]):
        size = "128" if ":" in address else "32"
        subprocess.run(["ip", "address", "add", f"{address}/{size}", "dev", "lo"], check=True)
    resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    resolver.bind(("127.0.0.1", 53))
    threading.Thread(target=answer_names, args=(resolver,), daemon=True).start()
    for kind, port, handler in ((Server, 5000, Registry), (Recording, 80, Elsewhere)):
        server = kind(("::", port), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps([run(case) for case in cases]))


if __name__ == "__main__":
    main()
