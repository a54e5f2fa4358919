"""
The pull mirror: that it answers, that runtimes are told of it, that it finds containerd's blobs. Layer: doctor.

Nothing is looked at where [mirror] is not configured and nothing was installed.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.config import split_address
from lazyfs.doctor.results import failed, ok, warning
from lazyfs.errors import LazyfsError
from lazyfs.mirror.contentstore import blobs_directory
from lazyfs.mirror.installing import Changed, Installation, check_answers, read_text
from lazyfs.registry.addresses import Reach, reach_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.doctor.results import Result, Subject

_INSTALL = "lazyfs mirror install"
_SHOWN = 3
_DEPTH_MAX = 16                  # of tables; containerd's are seven deep


def check_mirror(subject: Subject) -> Iterator[Result]:
    own = subject.config.mirror
    installed = Installation(Path(own.dir) / "install.json").files
    if not own.address:
        if installed:
            yield failed("mirror", f"{installed[0].path} names a mirror, and mirror.address is not set",
                         "set it, then: lazyfs daemon upgrade; or: lazyfs mirror uninstall")
        return
    try:
        check_answers(own.address)
    except LazyfsError as error:
        yield failed("mirror", str(error), error.hint)
    else:
        yield ok("mirror", f"answers at {own.address}")
    if reach_of(split_address(own.address)[0]) is not Reach.MACHINE or _is_everywhere(own.address):
        yield warning("mirror", f"{own.address} is open to other machines: whoever reaches it may pull what this node "
                                "may", "mirror.address with a port alone, or keep others out by a firewall")
    yield from _runtimes(installed, own.address)
    yield from _containerd(subject, installed)


def _is_everywhere(address: str) -> bool:
    """All addresses of this machine, which `reach_of` counts as nobody's."""
    return split_address(address)[0] in {"0.0.0.0", "::"}  # noqa: S104 - looked at


def _runtimes(installed: list[Changed], address: str) -> Iterator[Result]:
    """What `lazyfs mirror install` left still stands there, and means this address."""
    if not installed:
        yield warning("mirror's clients", "no container runtime is told of it", _INSTALL)
        return
    bad = [one.path for one in installed if address not in read_text(Path(one.path))]
    if bad:
        yield warning("mirror's clients", f"{', '.join(bad[:_SHOWN])}: {address} does not stand there (any more)",
                      _INSTALL)
    else:
        yield ok("mirror's clients", f"{len(installed)} files name it, first {installed[0].path}")


def _containerd(subject: Subject, installed: list[Changed]) -> Iterator[Result]:
    """Its own configuration, as far as it is about pulling; what cannot be read there others say."""
    root = subject.config.mirror.containerd_root
    blobs = blobs_directory(root) if root else None
    if blobs is not None and not blobs.is_dir():
        yield warning("containerd's blobs", f"{blobs} is not there: what containerd has is fetched once more",
                      'set mirror.containerd_root to containerd\'s root; without containerd: ""')
    elif blobs is not None and not os.access(blobs, os.R_OK | os.X_OK):
        yield warning("containerd's blobs", f"{blobs} cannot be read", "run it, and the daemon, as root")
    elif blobs is not None:
        yield ok("containerd's blobs", f"{blobs} can be read")
    try:
        found = tomllib.loads(read_text(Path(subject.containerd_file)))
    except (LazyfsError, tomllib.TOMLDecodeError, RecursionError):
        return
    if True in _values(found, "discard_unpacked_layers"):
        yield warning("containerd's blobs", "discard_unpacked_layers = true: it keeps no layers that could be shared",
                      f"set it to false in {subject.containerd_file}")
    named = {part for value in _values(found, "config_path") for part in str(value).split(":") if part}
    files = [Path(one.path) for one in installed]
    places = {str(one.parent.parent) for one in files if one.name == "hosts.toml" and "docker" not in one.parts}
    if found and places and not places & named:
        yield warning("mirror's clients", f"containerd does not look into {min(places)}: no config_path names it",
                      f"add it to the registry section of {subject.containerd_file}, for kubelet's pulls")


def _values(found: object, key: str, depth: int = 0) -> Iterator[Any]:
    """Of a key, in whatever table it stands: sections have other names in each version."""
    if isinstance(found, dict) and depth < _DEPTH_MAX:
        for name, value in found.items():
            if name == key:
                yield value
            yield from _values(value, key, depth + 1)
