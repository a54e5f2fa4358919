"""docker-registry, anywhere: on loopback, or at the far end of a link."""

from __future__ import annotations

import hashlib
import http
import http.client
import json
import re
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from benchmarks.kit.proc import Daemon, ToolError, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from benchmarks.kit.workspace import Workspace

_START_TIMEOUT_S = 20.0
PUSH_TIMEOUT_S = 600.0
_PORT = 5000  # at the far end of a link, where nothing else listens
_REQUEST = re.compile(rb'"[A-Z]+ /v2/', re.MULTILINE)  # in the access log


class Spot(Protocol):
    """A place in another network: the far end of a Link, a machine of a Rack."""

    @property
    def address(self) -> str: ...

    def inside(self) -> list[str]:
        """Words to put before a command that is to run there."""
        ...

    def reach(self, call: Callable[[], bool]) -> bool:
        """Call it where `address` is reached."""
        ...


@dataclass(frozen=True, slots=True)
class Registry:
    """A running registry."""

    host: str  # with port
    daemon: Daemon
    log: Path  # with one line a request

    def reference(self, repository: str, tag: str = "latest") -> str:
        """As lazyfs and skopeo want it."""
        return f"docker://{self.host}/{repository}:{tag}"

    def push(self, layout: Path, repository: str, tag: str = "latest") -> str:
        """Copy an OCI layout's `latest` here; returns its reference."""
        target = self.reference(repository, tag)
        words = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", f"oci:{layout}:latest", target]
        run(words, timeout_s=PUSH_TIMEOUT_S)
        return target

    def put_blob(self, repository: str, path: Path) -> str:
        """Upload a file as a blob, by no manifest referred to; returns the address of what is in it."""
        with path.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
            file.seek(0)
            connection = http.client.HTTPConnection(self.host, timeout=PUSH_TIMEOUT_S)
            try:
                connection.request("POST", f"/v2/{repository}/blobs/uploads/")
                answer = connection.getresponse()
                answer.read()
                place = answer.headers["Location"]
                place = place[place.index("/v2/"):] + ("&" if "?" in place else "?") + f"digest={digest}"
                size = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
                connection.request("PUT", place, file, size)
                status = connection.getresponse().status
            finally:
                connection.close()
        if status != http.HTTPStatus.CREATED:
            raise ToolError(f"docker-registry answered {status} to the upload of {path.name}")
        return f"/v2/{repository}/blobs/{digest}"

    def request_count(self) -> int:
        """How many requests it has answered so far."""
        return len(_REQUEST.findall(self.log.read_bytes()))

    def close(self) -> None:
        self.daemon.close()


def start_registry(place: Workspace, *, link: Spot | None = None) -> Registry:
    """
    Start a registry over the workspace's one storage; ready when this returns. It ends with the workspace.

    Raises:
        ToolError: it ended at once, or did not answer in time.

    """
    storage = place.top / "registry"
    storage.mkdir(parents=True, exist_ok=True)
    address, port = (link.address, _PORT) if link else ("127.0.0.1", _free_port())
    config = storage / f"config-{address}.json"  # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "version": 0.1,
                "log": {"level": "warn"},
                "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
                "http": {"addr": f"{address}:{port}"},
            }
        )
    )
    words: list[str | Path] = [*(link.inside() if link else []), "docker-registry", "serve", config]
    log = storage / f"registry-{address}.log"
    daemon = Daemon(words, log=log, env={"OTEL_TRACES_EXPORTER": "none"})
    place.stack.callback(daemon.close)
    limit = time.monotonic() + _START_TIMEOUT_S
    while not (link.reach(lambda: _answers(address, port)) if link else _answers(address, port)):
        daemon.check()
        if time.monotonic() > limit:
            raise ToolError(f"docker-registry does not answer at {address}:{port}")
        time.sleep(0.05)
    return Registry(f"{address}:{port}", daemon, log)


def _answers(address: str, port: int) -> bool:
    connection = http.client.HTTPConnection(address, port, timeout=2)
    try:
        connection.request("GET", "/v2/")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
