"""
A real registry for tests: Debian's docker-registry (distribution 2.8) on loopback, its storage in a temp directory.

    with running_registry(tmp_path) as registry:
        registry.host            # "127.0.0.1:40123": for docker://{registry.host}/repo:tag
        registry.storage         # Path of its storage root (edit files below it to corrupt blobs at rest)
        registry.blob_path(digest_text)   # file that holds a blob
        registry.restart() / registry.stop() / registry.start()   # same port, same storage

Options of running_registry: username/password (htpasswd), token_realm + token_service + token_issuer + token_ca (for
bearer tokens, see tests/tokenserver.py), tls_certificate + tls_key (PEM files), delete (default True), read_only,
relative_urls (in Location).
The process is ended when the block ends, whatever happens, and also when the thread that started it ends (so start it
from a thread that stays, best the main one). `require_registry()` skips a test, saying why, without docker-registry.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROGRAM = shutil.which("docker-registry")
START_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def require_registry() -> None:
    """Skip the calling test where docker-registry is not installed."""
    if PROGRAM is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")


def bcrypt_line(username: str, password: str) -> str:
    """One htpasswd line; docker-registry accepts bcrypt only. libcrypt, as Python's crypt module is on its way out."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    hashed = library.crypt(password.encode(), b"$2b$04$abcdefghijklmnopqrstuu")
    return f"{username}:{hashed.decode()}\n"


@dataclass
class Registry:
    """A docker-registry process. `host` is host:port."""

    host: str
    directory: Path
    storage: Path
    config: Path
    tls: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def blob_path(self, digest: str) -> Path:
        """The file where the registry keeps a blob (or manifest)."""
        hexadecimal = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / hexadecimal[:2] / hexadecimal / "data"

    def start(self) -> None:
        assert self.process is None, "already started"
        with (self.directory / "registry.log").open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM or "docker-registry", "serve", str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - nothing but one prctl
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        name, _, port = self.host.rpartition(":")
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection((name, int(port)), 1):
                return
            time.sleep(0.02)
        raise RuntimeError("docker-registry did not start: " + (self.directory / "registry.log").read_text()[-2000:])

    def stop(self) -> None:
        """End the process (idempotent)."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def restart(self) -> None:
        self.stop()
        self.start()


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def registry_config(
    storage: Path,
    host: str,
    *,
    htpasswd: Path | None = None,
    token: dict[str, str] | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    delete: bool = True,
    read_only: bool = False,
    relative_urls: bool = False,
) -> str:
    """The registry's configuration. JSON is YAML."""
    config: dict[str, object] = {
        "version": "0.1",
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {
            "filesystem": {"rootdirectory": str(storage)},
            "delete": {"enabled": delete},
            "maintenance": {"readonly": {"enabled": read_only}, "uploadpurging": {"enabled": False}},
        },
        "http": {"addr": host, "secret": "a-secret-for-tests", "relativeurls": relative_urls},
    }
    http_part = config["http"]
    assert isinstance(http_part, dict)
    if tls_certificate is not None:
        http_part["tls"] = {"certificate": str(tls_certificate), "key": str(tls_key)}
    if htpasswd is not None:
        config["auth"] = {"htpasswd": {"realm": "test-realm", "path": str(htpasswd)}}
    if token is not None:
        config["auth"] = {"token": token}
    return json.dumps(config, indent=1)


@contextlib.contextmanager
def running_registry(
    directory: Path,
    *,
    username: str = "",
    password: str = "",
    token_realm: str = "",
    token_service: str = "",
    token_issuer: str = "",
    token_ca: Path | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    delete: bool = True,
    read_only: bool = False,
    relative_urls: bool = False,
    storage: Path | None = None,
    port: int = 0,
    address: str = "127.0.0.1",
) -> Iterator[Registry]:
    """Start a registry, yield it, end it. `storage` may be another registry's, to serve the same content twice."""
    require_registry()
    host = f"{address}:{port or free_port()}"
    home = directory / f"registry-{host.replace(':', '-')}"
    home.mkdir(parents=True)
    storage = storage or home / "storage"
    htpasswd = None
    if username:
        htpasswd = home / "htpasswd"
        htpasswd.write_text(bcrypt_line(username, password))
    token = None
    if token_realm:
        token = {
            "realm": token_realm, "service": token_service, "issuer": token_issuer, "rootcertbundle": str(token_ca),
        }
    config = home / "config.yml"
    config.write_text(
        registry_config(
            storage, host, htpasswd=htpasswd, token=token, tls_certificate=tls_certificate, tls_key=tls_key,
            delete=delete, read_only=read_only, relative_urls=relative_urls,
        )
    )
    registry = Registry(host, home, storage, config, tls=tls_certificate is not None)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()
