"""containerd: does it run, which version, does it know our snapshotter, is it configured for it. Layer: doctor."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.doctor.results import failed, ok, warning
from lazyfs.errors import LazyfsError
from lazyfs.node.protocol import connect_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.doctor.results import Result, Subject

_CONNECT_S = 3.0
_ANSWER_S = 5.0
_INSTALL = "lazyfs snapshotter install, then restart containerd"
_AS_ROOT = "run this as root"
_OTHER_FILE = "repair it, or name another file: --containerd-config"


def check_snapshotter(subject: Subject) -> Iterator[Result]:
    address = subject.config.snapshotter.address
    try:
        _connect(address)
    except OSError as error:
        hint = "systemctl start lazyfs-snapshotter, or: lazyfs snapshotter"
        yield failed("snapshotter", f"{address}: {error.strerror or error}",
                     _AS_ROOT if isinstance(error, PermissionError) else hint)
        return
    # through containerd it would not be asked: what containerd has no record of, it denies by itself
    from snapshotter.containerd import Containerd  # noqa: PLC0415 - gRPC is heavy
    from snapshotter.install.settings import NAME  # noqa: PLC0415

    with Containerd(address) as client:
        try:
            client.snapshot(NAME, "lazyfs-doctor", _ANSWER_S)
        except LazyfsError as error:
            yield failed("snapshotter", f"{address} takes connections, but does not answer: {error}",
                         "look at its log; systemctl restart lazyfs-snapshotter")
        else:
            yield ok("snapshotter", f"answers on {address}")


def check_containerd(subject: Subject) -> Iterator[Result]:
    from snapshotter.containerd import Containerd  # noqa: PLC0415 - gRPC is heavy
    from snapshotter.install.settings import NAME  # noqa: PLC0415
    from snapshotter.install.version import parse_version  # noqa: PLC0415

    address = subject.config.snapshotter.containerd_address
    try:
        _connect(address)
    except OSError as error:
        hint = "start containerd, or configure snapshotter.containerd_address"
        yield failed("containerd", f"{address}: {error.strerror or error}",
                     _AS_ROOT if isinstance(error, PermissionError) else hint)
        return
    with Containerd(address) as client:
        try:
            yield ok("containerd", f"version {parse_version(client.version(_ANSWER_S))}")
        except LazyfsError as error:
            yield failed("containerd", f"{address} takes connections, but does not answer: {error}",
                         error.hint or "look at its log; systemctl restart containerd")
            return
        try:
            client.snapshot(NAME, "lazyfs-doctor", _ANSWER_S)
        except LazyfsError as error:
            text = str(error)
            hint = _INSTALL if "not loaded" in text or "not found" in text else "look at the snapshotter's log"
            yield failed("snapshotter in containerd", text, hint)
        else:
            yield ok("snapshotter in containerd", f"{NAME} is registered")


def check_configuration(subject: Subject) -> Iterator[Result]:
    from snapshotter.install import apply, edit  # noqa: PLC0415
    from snapshotter.install.settings import choose_file_version, settings_for  # noqa: PLC0415
    from snapshotter.install.version import running_version  # noqa: PLC0415

    own = subject.config.snapshotter
    try:
        version = running_version(own.containerd_address)
        path = Path(os.path.realpath(subject.containerd_file))
        text = apply.read_configuration(path)
        file_version = choose_file_version(version, edit.read_toml(text, str(path)))
        wanted = settings_for(version, file_version, address=own.address, root=own.root, cri=True)
        _, changes = edit.set_values(text, file_version, wanted, str(path))
    except LazyfsError as error:
        yield failed("containerd's configuration", str(error), error.hint or _OTHER_FILE)
        return
    missing = [".".join(change.path) for change in changes]
    if not missing:
        yield ok("containerd's configuration", f"{path} names the snapshotter, for CRI too")
    elif any(name.startswith("proxy_plugins") for name in missing):
        yield failed("containerd's configuration", f"{path} lacks {', '.join(missing)}", _INSTALL)
    else:
        yield warning("containerd's configuration", f"{path} lacks {', '.join(missing)}",
                      f"for kubelet: {_INSTALL}")


def _connect(address: str) -> None:
    """Raises OSError: nobody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_S)
        connect_to(client, Path(address))
