"""
A registry with the referrers API, which Debian's docker-registry does not have: its requests go through to that one.

    with running_registry(tmp_path) as registry, ReferrersApi(registry.host) as api:
        open_source(f"docker://{api.host}/repo:tag", ...)
        api.pages               # knob: so many pages for each listing
        api.filters             # knob: False: every type is listed, whatever was asked for, as registries may
        api.answer              # knob: (status, content type, body) in place of each listing
        api.asked               # paths of the listings that were asked for

It knows what was put through it (distribution-spec v1.1 "Listing Referrers"). No authentication, no redirects.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"


class ReferrersApi:
    """See the module."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.pages = 1
        self.filters = True
        self.answer: tuple[int, str, bytes] | None = None
        self.asked: list[str] = []
        self.referrers: dict[str, list[dict[str, Any]]] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.host = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, data: bytes) -> None:
        """Remember what a manifest refers to."""
        manifest = json.loads(data)
        if "subject" in manifest:
            self.referrers.setdefault(manifest["subject"]["digest"], []).append({
                "mediaType": manifest["mediaType"], "digest": "sha256:" + hashlib.sha256(data).hexdigest(),
                "size": len(data), "artifactType": manifest["artifactType"], "annotations": manifest["annotations"]})

    def listing(self, path: str) -> tuple[int, str, bytes, str]:
        """Status, content type, body and Link of one page."""
        self.asked.append(path)
        if self.answer is not None:
            return (*self.answer, "")
        parts = urlsplit(path)
        words = parse_qs(parts.query)
        page = int(words.get("page", ["0"])[-1])
        found = [one for one in self.referrers.get(parts.path.rpartition("/")[2], [])
                 if not self.filters or one["artifactType"] in words.get("artifactType", [one["artifactType"]])]
        link = f'<{parts.path}?{parts.query}&page={page + 1}>; rel="next"' if page + 1 < self.pages else ""
        body = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": found[page :: self.pages]}
        return 200, INDEX_TYPE, json.dumps(body).encode(), link

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.close_connection = True
                if "/referrers/" in self.path:
                    status, kind, data, link = api.listing(self.path)
                    self.respond(status, {"Content-Type": kind, **({"Link": link} if link else {})}, data)
                    return
                with contextlib.closing(http.client.HTTPConnection(api.upstream, timeout=20)) as connection:
                    kept = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                    connection.request(self.command, self.path, body or None, kept)
                    answer = connection.getresponse()
                    data = answer.read()
                if self.command == "PUT" and "/manifests/" in self.path and answer.status == 201:
                    api.put(body)
                headers = {name: value for name, value in answer.getheaders()
                           if name.lower() not in {"content-length", "transfer-encoding", "connection"}}
                self.respond(answer.status, headers, data, answer.getheader("Content-Length"))

            def respond(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815 - http.server's names

        return Handler
