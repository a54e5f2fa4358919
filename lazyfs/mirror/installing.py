"""
Put files of runtimes' configuration in place, and back, to the byte.

Layer: mirror; blocking. Who calls: cli.mirror_install. State: the record (JSON in mirror.dir): each file as it was
before, and the digest of what we left. It is written before a file is: a crash between the two leaves a record of what
did not happen, which uninstalling sees by the digest.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from lazyfs.config import split_address
from lazyfs.config.atomic import write_atomically
from lazyfs.errors import ConfigError, FormatError, HostError, TargetError
from lazyfs.limits import KIB
from lazyfs.mirror import runtimes
from lazyfs.registry.hosts import OWN_MIRROR

FILE_BYTES_MAX: Final = 256 * KIB
_RECORD_BYTES_MAX: Final = 32 * FILE_BYTES_MAX
_FILE_COUNT_MAX: Final = 64
_ANSWER_S: Final = 5.0
CONTAINERD_DIR: Final = "/etc/containerd/certs.d"
DOCKER_DIR: Final = "/etc/docker/certs.d"
DAEMON_JSON: Final = "/etc/docker/daemon.json"
PODMAN_DIR: Final = "/etc/containers"
_DROP_IN: Final = "registries.conf.d/50-lazyfs-mirror.conf"


@dataclass
class Changed:
    """
    One file.

    Attributes:
        before: its bytes, base64; None: it was not there.
        digest: SHA-256 of what we left.
        made: directories that were made for it, the innermost last.
        backup: a copy of `before` beside it, for people.

    """

    path: str
    before: str | None
    digest: str
    made: list[str] = field(default_factory=list)
    backup: str = ""


class Installation:
    """What was put in place so far; `path`: of the record."""

    def __init__(self, path: Path) -> None:
        """Raises FormatError: the record is damaged."""
        self._path = path
        self.files: list[Changed] = []
        try:
            if path.stat().st_size > _RECORD_BYTES_MAX:
                raise ValueError("too large")   # noqa: TRY301 - as if it said so
            self.files = [Changed(**one) for one in json.loads(path.read_bytes())["files"]]
        except FileNotFoundError:
            pass
        except (ValueError, LookupError, TypeError) as error:
            raise FormatError(f"{path}: malformed record of an installation: {error}",
                              hint="take the mirror out of the runtime's configuration by hand, then remove it"
                              ) from error

    def put(self, file: Path, text: str) -> None:
        """
        Give a file this content.

        Raises:
            TargetError: it cannot be written, or there are too many. HostError: the record cannot be.

        """
        data = text.encode()
        known = next((one for one in self.files if one.path == str(file)), None)
        made = [str(one) for one in reversed([file.parent, *file.parent.parents]) if not one.exists()]
        if known is None:
            if len(self.files) >= _FILE_COUNT_MAX:
                raise TargetError(f"more than {_FILE_COUNT_MAX} files", hint="name fewer registries")
            before = file.read_bytes() if file.exists() else None
            known = Changed(str(file), None if before is None else base64.b64encode(before).decode(), "", made)
            if before is not None:
                stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
                known.backup = str(file.with_name(f"{file.name}.lazyfs-{stamp}.bak"))
                write_atomically(Path(known.backup), before, file.stat().st_mode & 0o7777)
            self.files.append(known)
        known.digest = hashlib.sha256(data).hexdigest()
        self._write()
        try:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            write_atomically(file, data, 0o644)
        except OSError as error:
            raise TargetError(f"{file}: {error.strerror}", hint="run it as root") from error

    def take_back(self) -> list[str]:
        """Everything as it was. Returns the files that somebody else has changed since, and which stay."""
        left: list[str] = []
        for one in reversed(self.files):
            path = Path(one.path)
            found = path.read_bytes() if path.exists() else None
            before = None if one.before is None else base64.b64decode(one.before)
            if found is not None and hashlib.sha256(found).hexdigest() == one.digest:
                if before is None:
                    path.unlink()
                else:
                    write_atomically(path, before, 0o644)
            elif found != before:
                left.append(one.path)
                continue
            if one.backup:
                Path(one.backup).unlink(missing_ok=True)
            for directory in reversed(one.made):
                with contextlib.suppress(OSError):
                    Path(directory).rmdir()
        self._path.unlink(missing_ok=True)
        self.files = []
        return left

    def _write(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps({"files": [asdict(one) for one in self.files]}).encode(), 0o600)
        except OSError as error:
            raise HostError(f"{self._path}: {error.strerror}", hint="run it as root") from error


def for_hosts_dir(into: Installation, directory: Path, registries: list[str], address: str) -> list[str]:
    """
    hosts.toml of containerd's kind, for the registries named, or for all. Returns what was passed over, and why.

    For all: `_default`, and each registry that has a hosts.toml, for containerd reads only one of them. A directory
    with certificates alone is passed over: with a hosts.toml in it they would not count any more.
    """
    passed = []
    if registries:
        places = [directory / runtimes.hosts_directory(name) for name in registries]
    else:
        others = sorted(one.parent for one in directory.glob("*/hosts.toml"))
        places = [directory / "_default", *(one for one in others if one.name != "_default")]
        passed = [f"{one}: has certificates, but no hosts.toml" for one in sorted(directory.glob("*"))
                  if one.is_dir() and one not in places]
    for place in places:
        file = place / "hosts.toml"
        if place.is_dir() and not file.exists() and any(place.iterdir()):
            passed.append(f"{place}: has certificates, but no hosts.toml")
            continue
        changed = runtimes.in_hosts_toml(read_text(file), address, str(file))
        if changed is not None:
            into.put(file, changed)
    return passed


def for_docker(into: Installation, daemon_json: Path, hosts_dir: Path, registries: list[str],
               address: str) -> list[str]:
    """Both of Docker's stores. As for_hosts_dir."""
    changed = runtimes.in_daemon_json(read_text(daemon_json), address, str(daemon_json))
    passed = for_hosts_dir(into, hosts_dir, registries, address)
    if changed is not None:
        into.put(daemon_json, changed)
    return passed


def for_podman(into: Installation, directory: Path, registries: list[str], address: str) -> None:
    """Podman and CRI-O: a file of ours in registries.conf.d. Raises TargetError: another one is in its way."""
    file = directory / _DROP_IN
    names = runtimes.podman_registries(registries)
    others = [directory / "registries.conf", *sorted((directory / "registries.conf.d").glob("*.conf"))]
    runtimes.check_registries({str(one): read_text(one) for one in others if one != file}, names)
    text = runtimes.registries_conf(names, address)
    if read_text(file) != text:
        into.put(file, text)


def check_answers(address: str) -> None:
    """Raises HostError: there is no mirror of ours; every pull would ask in vain."""
    host, port = split_address(address)
    connection = http.client.HTTPConnection(host, port, timeout=_ANSWER_S)
    try:
        connection.request("GET", "/v2/")
        answer = connection.getresponse()
        if answer.status == 200 and answer.headers.get(OWN_MIRROR):
            return
        found = f"status {answer.status} of something else"
    except (OSError, http.client.HTTPException) as error:
        found = str(error)
    finally:
        connection.close()
    raise HostError(f"no mirror answers at {address}: {found}",
                    hint="set mirror.address, then: lazyfs daemon upgrade, or systemctl start lazyfs-mirror")


def read_text(file: Path) -> str:
    """Empty: it is not there. Raises ConfigError: too large, not text, not to be read."""
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
        text = data.decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", hint="run it as root") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not text", hint="repair it first") from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError(f"{file}: expected at most {FILE_BYTES_MAX} bytes", hint="is this its configuration?")
    return text
