"""
`lazyfs snapshotter`: containerd's remote snapshotter, in the foreground. The work is in package snapshotter.

Running means becoming: this process turns into the door (snapshotter.door), which must not carry what the command line
imported. The door starts this command again, with `--behind`: that is the server.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lazyfs import config, logs, stacks
from lazyfs.cli.lazygroup import LazyGroup
from lazyfs.errors import HostError
from lazyfs.fs.confine import hide_memory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

    from lazyfs.config.table import Snapshotter
    from snapshotter.core import Snapshots

_EPILOG = """\b
Examples:
  lazyfs snapshotter                      run it here (systemd does this)
  lazyfs snapshotter install --print      what containerd's configuration needs
  ctr image pull --snapshotter lazyfs REF     (containerd 2.x; with 1.6: lazyfs pull REF)
"""
BEAT_S = 10.0                    # of the server's signs of life; the door waits for several
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
@click.option("--behind", type=int, hidden=True, metavar="NUMBER")
@click.option("--beat", type=float, hidden=True, default=BEAT_S, metavar="SECONDS")
@click.pass_context
def snapshotter_command(context: click.Context, *, file: str | None, root: str | None, address: str | None,
                        containerd_address: str | None, behind: int | None, beat: float) -> None:
    """Serve containerd's snapshots: ordinary images as overlayfs does, lazy images without downloading them."""
    if context.invoked_subcommand is not None:
        return
    if os.geteuid() != 0:
        raise HostError("the snapshotter needs root: it keeps files of all owners", hint="run it with sudo")
    found = config.load(file)
    own = dataclasses.replace(found.snapshotter, root=str(Path(root or found.snapshotter.root).resolve()),
                              address=str(Path(address or found.snapshotter.address).absolute()),
                              containerd_address=containerd_address or found.snapshotter.containerd_address)
    if behind is None:
        _become_door(own, file, beat)
    _serve(dataclasses.replace(found, snapshotter=own), behind, beat)


def _become_door(own: Snapshotter, file: str | None, beat_s: float) -> NoReturn:
    """Raises HostError: the root cannot be made."""
    root = Path(own.root)
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        text = f"cannot use {root}: {error.strerror}"
        raise HostError(text, hint="it must be a local disk, writable by root") from error
    server = [sys.executable, "-m", "lazyfs", "snapshotter", "--root", own.root, "--address", own.address,
              "--containerd-address", own.containerd_address, "--beat", str(beat_s),
              *(["--config", file] if file else [])]
    door = {"address": own.address, "root": own.root, "words": server, "beat_s": beat_s}
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "snapshotter.door", json.dumps(door)])   # noqa: S606


def _serve(settings: config.Config, behind: int, beat_s: float) -> None:
    """Until SIGTERM or SIGINT; says "ready" on descriptor `behind`, then "alive" now and then. Raises LazyfsError."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")   # we fork nothing that could use it
    os.set_inheritable(behind, False)
    hide_memory()   # it holds what kubelet pulls with
    from snapshotter.core import Snapshots  # noqa: PLC0415 - gRPC is heavy: not for --help
    from snapshotter.credentials.make import credential_proxy  # noqa: PLC0415
    from snapshotter.door import SERVER_SOCKET  # noqa: PLC0415
    from snapshotter.heartbeat import Heartbeat  # noqa: PLC0415
    from snapshotter.lazymake import make_lazy_images  # noqa: PLC0415
    from snapshotter.service import serve  # noqa: PLC0415

    logs.setup(settings.log, program="snapshotter")
    told, tells = os.pipe2(os.O_CLOEXEC)   # written by the C handler, in whichever thread it runs
    os.set_blocking(tells, False)
    signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)
    stacks.install(_dump)

    def ready() -> None:
        os.write(behind, b"ready\n")

    own = settings.snapshotter
    lazy = make_lazy_images(settings)
    snapshots = Snapshots.open(Path(own.root), lazy)
    directory = os.open(own.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)   # sockets' paths must be short
    try:
        lazy.reconcile(snapshots.bootstraps())
        beat = Heartbeat(lambda: _look(snapshots, Path(own.root)), lambda: os.write(behind, b"alive\n"), beat_s)
        with credential_proxy(settings) as proxy, beat:
            serve(snapshots, f"/proc/self/fd/{directory}/{SERVER_SOCKET}", own.threads, lambda: _wait_for_end(told),
                  ready=ready, extra=proxy)
    finally:
        snapshots.close()
        os.close(directory)


def _look(snapshots: Snapshots, root: Path) -> None:
    """For the heartbeat: raises what is wrong with the records; what was asked so far is written beside them."""
    from snapshotter.calls import CALLS  # noqa: PLC0415

    snapshots.check()
    CALLS.write(root)


def _wait_for_end(told: int) -> None:
    """Until SIGTERM or SIGINT; other signals are written there as well."""
    while os.read(told, 1)[0] not in {signal.SIGTERM, signal.SIGINT}:
        pass


def _dump(threads: Iterable[str]) -> None:
    """For SIGUSR1: in a thread, for this one may hold any lock at this moment."""
    from snapshotter.calls import CALLS  # noqa: PLC0415

    lines = list(threads)

    def write() -> None:
        for line in (*lines, *CALLS.lines()):
            logging.getLogger("lazyfs.dump").warning("%s", line)

    threading.Thread(target=write, name="lazyfs-dump", daemon=True).start()


def _note(_number: int, _frame: FrameType | None) -> None:
    """That there is a handler has the signal written to the wake-up descriptor."""
