"""`lazyfs snapshotter`: containerd's remote snapshotter, in the foreground. The work is in package snapshotter."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs import config, logs
from lazyfs.cli.lazygroup import LazyGroup
from lazyfs.errors import HostError

if TYPE_CHECKING:
    from types import FrameType

_EPILOG = """\b
Examples:
  lazyfs snapshotter                      run it here (systemd does this)
  lazyfs snapshotter install --print      what containerd's configuration needs
  ctr image pull --snapshotter lazyfs REF     (containerd 2.x; with 1.6: lazyfs pull REF)
"""
# name -> (module:attribute, one line for the overview), as in cli.main
_COMMANDS = {
    "install": ("lazyfs.cli.snapshotter_install:install_command", "Write lazyfs into containerd's configuration."),
    "uninstall": ("lazyfs.cli.snapshotter_install:uninstall_command", "Take it out again."),
}


@click.group("snapshotter", cls=LazyGroup, places=_COMMANDS, epilog=_EPILOG, invoke_without_command=True,
             short_help="Serve containerd's snapshots; lazy images among them.")
@click.option("--config", "file", metavar="FILE", help="Configuration; default: /etc/lazyfs/config.toml.")
@click.option("--root", metavar="DIR", help="Snapshots and their records.")
@click.option("--address", metavar="SOCKET", help="Where containerd asks.")
@click.option("--containerd-address", metavar="SOCKET", help="Where containerd answers.")
@click.pass_context
def snapshotter_command(context: click.Context, file: str | None, root: str | None, address: str | None,
                        containerd_address: str | None) -> None:
    """Serve containerd's snapshots: ordinary images as overlayfs does, lazy images without downloading them."""
    if context.invoked_subcommand is not None:
        return
    if os.geteuid() != 0:
        raise HostError("the snapshotter needs root: it keeps files of all owners", hint="run it with sudo")
    found = config.load(file)
    own = dataclasses.replace(found.snapshotter, root=str(Path(root or found.snapshotter.root).resolve()),
                              address=address or found.snapshotter.address,
                              containerd_address=containerd_address or found.snapshotter.containerd_address)
    _serve(dataclasses.replace(found, snapshotter=own))


def _serve(settings: config.Config) -> None:
    """Until SIGTERM or SIGINT. Raises LazyfsError."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")   # we fork nothing that could use it
    from lazyfs.node.notify import notify  # noqa: PLC0415 - gRPC is heavy: not for --help
    from snapshotter.core import Snapshots  # noqa: PLC0415
    from snapshotter.credentials.make import credential_proxy  # noqa: PLC0415
    from snapshotter.lazymake import make_lazy_images  # noqa: PLC0415
    from snapshotter.service import serve  # noqa: PLC0415

    logs.setup(settings.log, program="snapshotter")
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    def tell(state: str) -> None:
        notify(state)

    own = settings.snapshotter
    lazy = make_lazy_images(settings)
    snapshots = Snapshots.open(Path(own.root), lazy)
    try:
        lazy.reconcile(snapshots.bootstraps())
        with credential_proxy(settings) as proxy:
            serve(snapshots, own.address, own.threads, ended, ready=lambda: tell("READY=1"), extra=proxy)
    finally:
        tell("STOPPING=1")
        snapshots.close()
