"""
Which servers a registry's images are read from: containerd's directory of hosts.toml files.

Layer: registry. Who calls: client.py. Looked for in <hosts_dir>/<host>_<port>_, <host>:<port>, then _default, as
containerd does: hosts.toml, or without one the files of docker's layout (*.crt authorities, *.cert with *.key). Read
anew when a file has changed, looked at no more than every few seconds: nothing needs a restart.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from lazyfs.errors import UsageError
from lazyfs.limits import KIB
from lazyfs.registry.hoststoml import HostEntry, HostsFile, parse_hosts_toml

if TYPE_CHECKING:
    from pathlib import Path

_FILE_BYTES_MAX = 256 * KIB
_CERTIFICATE_COUNT_MAX = 64
_HOST = re.compile(r"[A-Za-z0-9.\-_\[\]]+(?::\d{1,5})?\Z|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?\Z")
_log: Final = logging.getLogger("lazyfs.registry")
_warned: set[str] = set()   # bounded by the files that an administrator wrote

# A header in hosts.toml that says: this is lazyfs' own mirror. It is for others: here it would ask itself.
OWN_MIRROR: Final = "X-Lazyfs-Mirror"
PLAIN: Final = HostsFile((), HostEntry())


@dataclass(frozen=True, slots=True)
class Stamp:
    """What would change if the files did."""

    found: tuple[tuple[str, int, int], ...] = ()


def find_hosts(directory: Path | None, host: str) -> HostsFile:
    """
    What the directory says about registry `host`; PLAIN if nothing.

    Raises:
        UsageError: what it says cannot be read or is wrong.

    """
    place = _place(directory, host)
    if place is None:
        return PLAIN
    path = place / "hosts.toml"
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return HostsFile((), _docker_layout(place))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint="check its mode") from error
    if len(data) > _FILE_BYTES_MAX:
        raise UsageError(f"{path}: larger than {_FILE_BYTES_MAX} bytes, this is no hosts.toml")
    try:
        found = parse_hosts_toml(data.decode(), path)
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8", hint="see docs/credentials.md") from None
    others = tuple(one for one in found.mirrors if all(name != OWN_MIRROR for name, _ in one.headers))
    found = replace(found, mirrors=others)
    if found.unknown and str(path) not in _warned:
        _warned.add(str(path))
        _log.warning("%s: keys that lazyfs does not know are passed over: %s", path, ", ".join(found.unknown)[:500])
    return found


def stamp(directory: Path | None, host: str) -> Stamp:
    """Compare two of them to know whether find_hosts() would find something else."""
    place = _place(directory, host)
    if place is None:
        return Stamp()
    found = []
    for path in (place, place / "hosts.toml"):
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_mtime_ns, status.st_ino))
    return Stamp(tuple(found))


def _place(directory: Path | None, host: str) -> Path | None:
    """The registry's directory, if there is one. `host` is checked: it came with an image's name."""
    if directory is None or not _HOST.match(host) or not host.strip("."):
        return None
    name, colon, port = host.rpartition(":")
    names = [f"{name}_{port}_"] if colon and port.isdigit() else []
    for one in (*names, host, "_default"):
        if (directory / one).is_dir():
            return directory / one
    return None


def _docker_layout(place: Path) -> HostEntry:
    """Certificates as docker looks for them; a *.cert without its *.key is an error there too."""
    try:
        names = sorted(path.name for path in place.iterdir())
    except OSError as error:
        raise UsageError(f"{place}: cannot be read: {error.strerror}", hint="check its mode") from error
    authorities = [place / name for name in names if name.endswith(".crt")]
    pairs = []
    for name in names:
        if name.endswith(".cert"):
            key = name.removesuffix(".cert") + ".key"
            if key not in names:
                raise UsageError(f"{place / name}: its key {key} is missing")
            pairs.append((place / name, place / key))
    if len(authorities) + len(pairs) > _CERTIFICATE_COUNT_MAX:
        raise UsageError(f"{place}: more than {_CERTIFICATE_COUNT_MAX} certificates")
    return HostEntry(ca_files=tuple(authorities), client_pairs=tuple(pairs))
