"""
A real mirror for tests: `lazyfs mirror` on loopback, with a directory and a configuration of its own; raw HTTP to it.

    with running_mirror(tmp_path) as mirror:                 # keys of [mirror] and [registry]: mirror=..., registry=...
        answer = mirror.get("/v2/repo/manifests/1", ns=registry.host)
        answer.status, answer.headers, answer.body
        mirror.stop() / mirror.start()                        # the same directory and address
        mirror.figure('lazyfs_mirror_requests_total{end="blobs",source="registry",status="200"}')

    push(registry.host, "repo", "tag", image)                 # any manifest with its blobs, by plain HTTP
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode

from lazyfs.image.digest import Digest
from tests.ports import free_port
from tests.registrykit import _die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from benchmarks.kit.nets import Machine

START_SECONDS = 30.0
END_SECONDS = 20.0


@dataclass
class Answer:
    """`headers`: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """The error's code."""
        return str(json.loads(self.body)["errors"][0]["code"])


def ask(host: str, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes | None = None, *,
        timeout_s: float = 60.0) -> Answer:
    """One request on a connection of its own."""
    connection = http.client.HTTPConnection(host, timeout=timeout_s)
    try:
        connection.request(method, path, body=body, headers=dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read())
    finally:
        connection.close()


@dataclass
class RunningMirror:
    """See the module."""

    directory: Path
    host: str
    config: Path
    machine: Machine | None = None               # of another network; None: this one
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> Self:
        assert self.process is None
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LAZYFS_")}
        environment |= {"LAZYFS_CONFIG": str(self.config), "HOME": str(self.directory)}
        with (self.directory / "mirror.log").open("ab") as log:
            words = [*(self.machine.inside() if self.machine else ()), sys.executable, "-m", "lazyfs", "mirror"]
            self.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                            preexec_fn=_die_with_parent)  # noqa: PLW1509 - nothing but one prctl
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._ask("GET", "/readyz", timeout_s=5).status == 200:
                    return self
            time.sleep(0.05)
        self.stop()
        raise RuntimeError(f"the mirror did not start: {self.log[-2000:]}")

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it (idempotent); its exit code."""
        process, self.process = self.process, None
        if process is None:
            return 0
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)          # who is frozen ends, too
        try:
            return process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise

    @property
    def log(self) -> str:
        return (self.directory / "mirror.log").read_text(errors="replace")

    def get(self, path: str, *, ns: str = "", method: str = "GET", headers: Mapping[str, str] | None = None,
            **query: str) -> Answer:
        """`ns`, `query`: of the URL."""
        fields = {**query, **({"ns": ns} if ns else {})}
        return self._ask(method, path + (f"?{urlencode(fields)}" if fields else ""), headers)

    def head(self, path: str, *, ns: str = "", headers: Mapping[str, str] | None = None) -> Answer:
        return self.get(path, ns=ns, method="HEAD", headers=headers)

    def figure(self, name: str) -> float:
        """One of its metrics; 0: there is none yet."""
        for line in self._ask("GET", "/metrics").body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def _ask(self, method: str, path: str, headers: Mapping[str, str] | None = None, *,
             timeout_s: float = 60.0) -> Answer:
        def call() -> Answer:
            return ask(self.host, method, path, headers, timeout_s=timeout_s)

        return self.machine.reach(call) if self.machine else call()


@contextlib.contextmanager
def running_mirror(directory: Path, *, mirror: Mapping[str, Any] | None = None,
                   sections: Mapping[str, Mapping[str, Any]] | None = None, port: int = 0,
                   machine: Machine | None = None) -> Iterator[RunningMirror]:
    """`mirror`: keys of [mirror]; `sections`: of others; `machine`: where it runs."""
    home = directory / f"mirror-{port or free_port()}"
    home.mkdir(parents=True)
    host = f"127.0.0.1:{port or free_port()}"
    config = home / "config.toml"
    tables: dict[str, Mapping[str, Any]] = {
        "mirror": {"address": host, "dir": str(home / "data"), "containerd_root": "", **(mirror or {})},
        "registry": {"hosts_dir": ""}, **(sections or {}),
    }
    config.write_text("".join(f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
                              for name, keys in tables.items()))
    running = RunningMirror(home, host, config, machine)
    try:
        yield running.start()
    finally:
        running.stop()


@dataclass
class PushedImage:
    """A manifest with what it lists. `data`: its bytes."""

    data: bytes
    media_type: str
    blobs: list[bytes]

    @property
    def digest(self) -> str:
        return str(Digest.of(self.data))


OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


def descriptor(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": str(Digest.of(data)), "size": len(data), **more}


def image_of(layers: list[bytes], config: bytes = b"", *, config_type: str = CONFIG_TYPE, **more: Any) -> PushedImage:
    """An OCI manifest; `more`: other keys of it."""
    diff_ids = [str(Digest.of(layer)) for layer in layers]
    config = config or json.dumps({"architecture": "amd64", "os": "linux", "config": {},
                                   "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    manifest = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(config, config_type),
                "layers": [descriptor(layer, LAYER_TYPE) for layer in layers], **more}
    return PushedImage(json.dumps(manifest).encode(), OCI_MANIFEST, [config, *layers])


def index_of(*members: PushedImage, **more: Any) -> PushedImage:
    """An OCI index of them; push these before."""
    manifest = {"schemaVersion": 2, "mediaType": OCI_INDEX,
                "manifests": [descriptor(one.data, one.media_type,
                                         platform={"architecture": "amd64", "os": "linux"}) for one in members], **more}
    return PushedImage(json.dumps(manifest).encode(), OCI_INDEX, [])


def push(host: str, repository: str, reference: str, image: PushedImage,
         headers: Mapping[str, str] | None = None) -> None:
    """Its blobs, then it, under a tag or its digest."""
    for blob in image.blobs:
        began = ask(host, "POST", f"/v2/{repository}/blobs/uploads/", headers)
        assert began.status == 202, began
        place = began.headers["location"].partition(host)[2] or began.headers["location"]
        done = ask(host, "PUT", f"{place}{'&' if '?' in place else '?'}digest={Digest.of(blob)}",
                   {**(headers or {}), "Content-Type": "application/octet-stream"}, blob)
        assert done.status == 201, done
    done = ask(host, "PUT", f"/v2/{repository}/manifests/{reference}",
               {**(headers or {}), "Content-Type": image.media_type}, image.data)
    assert done.status == 201, done
