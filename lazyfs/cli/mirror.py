"""`lazyfs mirror`: the pull mirror for ordinary images, in the foreground. The work is in lazyfs.mirror."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs.cli.lazygroup import LazyGroup
from lazyfs.errors import LazyfsError

if TYPE_CHECKING:
    from lazyfs.config import Config
    from lazyfs.image.digest import Digest

_EPILOG = """\b
Examples:
  lazyfs mirror                            serve at mirror.address, else 127.0.0.1:9453
  lazyfs mirror install                    have containerd pull through it (hosts.toml for every registry)
  lazyfs mirror install --podman --registry registry.example:5000
  lazyfs mirror uninstall                  everything as it was
"""
_BEAT_S = 0.5
# name -> (module:attribute, one line for the overview), as in cli.main
_COMMANDS = {
    "install": ("lazyfs.cli.mirror_install:install_command", "Have a container runtime pull through the mirror."),
    "uninstall": ("lazyfs.cli.mirror_install:uninstall_command", "Put its configuration back as it was."),
}


@click.group("mirror", cls=LazyGroup, places=_COMMANDS, epilog=_EPILOG, invoke_without_command=True,
             short_help="Serve ordinary images to this node's container runtime, from its peers.")
@click.option("--config", "file", metavar="FILE", help="Configuration; default: /etc/lazyfs/config.toml.")
@click.option("--address", metavar="HOST:PORT", help="Where to listen; loopback, unless you know better.")
@click.option("--dir", "directory", metavar="DIR", help="Where it keeps its data.")
@click.option("--containerd-root", metavar="DIR", help="containerd's directory; \"\": it is not looked at.")
@click.pass_context
def mirror_command(context: click.Context, *, file: str | None, address: str | None, directory: str | None,
                   containerd_root: str | None) -> None:
    """Serve the images that this node's container runtime pulls: from its own disk, from peers, from the registry."""
    if file is not None:
        os.environ["LAZYFS_CONFIG"] = os.path.realpath(file)
    if context.invoked_subcommand is not None:
        return
    from lazyfs import config, logs  # noqa: PLC0415 - start-up time of --help
    from lazyfs.config.kinds import Address  # noqa: PLC0415

    found = config.load()
    own = found.mirror
    try:
        where = str(Address().accept(address)) if address is not None else own.address
    except ValueError:
        raise click.UsageError(f"--address {address!r}: expected {Address().expected}") from None
    own = dataclasses.replace(own, address=where, dir=str(Path(directory).resolve()) if directory else own.dir,
                              containerd_root=own.containerd_root if containerd_root is None else containerd_root)
    logs.setup(found.log, program="mirror")
    _serve(dataclasses.replace(found, mirror=own))


def _serve(settings: Config) -> None:
    """Until SIGTERM or SIGINT. Raises LazyfsError."""
    import signal  # noqa: PLC0415

    import trio  # noqa: PLC0415

    from lazyfs.config import split_address  # noqa: PLC0415
    from lazyfs.fs.confine import confine, hide_memory  # noqa: PLC0415
    from lazyfs.mirror.serving import DEFAULT_ADDRESS, run  # noqa: PLC0415
    from lazyfs.node import notify  # noqa: PLC0415

    address = settings.mirror.address or DEFAULT_ADDRESS
    hide_memory()    # it holds what this node pulls with
    ports = split_address(address)[1], split_address(settings.mirror.peers_address)[1]
    for problem in confine(ports) if settings.daemon.confine and os.geteuid() == 0 else ():
        logging.getLogger("lazyfs.mirror").warning("not all rights could be given up: %s", problem)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def ready(where: str) -> None:
        print(f"mirror: http://{where}", file=sys.stderr, flush=True)
        notify.notify(f"READY=1\nSTATUS=mirror at {where}")

    def drop(digest: Digest) -> int:
        from snapshotter.containerd import Containerd, drop_writes  # noqa: PLC0415 - gRPC: for who was lied to only

        with Containerd(settings.snapshotter.containerd_address) as containerd:
            return drop_writes(containerd, digest)

    errors: list[LazyfsError] = []

    async def main() -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_beat)
                await run(settings, address, ready, drop if settings.mirror.containerd_root else None)
                nursery.cancel_scope.cancel()
        except* LazyfsError as group:
            errors.append(_first(group))

    trio.run(main)
    if errors:
        raise errors[0]


async def _beat() -> None:
    """Tell who watches us (the keeper, systemd) that the loop goes round."""
    import time  # noqa: PLC0415

    import trio  # noqa: PLC0415

    from lazyfs.node import notify  # noqa: PLC0415

    while True:
        await trio.to_thread.run_sync(notify.watchdog, time.monotonic())    # a full socket holds up a thread only
        await trio.sleep(_BEAT_S)


def _first(group: BaseExceptionGroup[LazyfsError]) -> LazyfsError:
    """The first of the errors that came together."""
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, LazyfsError)
    return found
