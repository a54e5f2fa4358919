"""
`lazyfs daemon`: run the node's daemon, ask it, replace it. Thin; the work is in lazyfs.node.keeper.

Running means becoming: this process turns into the keeper, which must not carry what the command line imported.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lazyfs.errors import HostError, LazyfsError, TargetError, UsageError

if TYPE_CHECKING:
    from lazyfs.node.rundir import WorkerDir

FILE_VARIABLE = "LAZYFS_CONFIG"
_DUMP_S = 10.0
_EPILOG = """\b
Examples:
  lazyfs daemon                 run it here (systemd does this)
  lazyfs daemon status          who serves, since when, what
  lazyfs daemon dump            what its worker is doing at this moment
  lazyfs daemon upgrade         go on with the version that is installed now; no reader sees an error
  lazyfs daemon stop            end it; mounts that are in use are still served, by its worker alone
"""


@click.group("daemon", epilog=_EPILOG, invoke_without_command=True, short_help="Serve all lazy images of this node.")
@click.option("--config", "file", metavar="FILE", help="The configuration.  [default: /etc/lazyfs/config.toml]")
@click.option("--cache-dir", metavar="DIR", help="Where fetched data is kept.  [default: configured]")
@click.option("--hang-timeout", type=click.FloatRange(2), metavar="SECONDS",
              help="A worker without a sign of life for that long is replaced.  [default: configured]")
@click.pass_context
def daemon_command(context: click.Context, file: str | None, cache_dir: str | None, hang_timeout: float | None) -> None:
    """
    Serve all lazy images of this node through one FUSE mount.

    The keeper holds the kernel's connection, a worker serves it. If the worker dies, the next one goes on with the
    same mounts: what runs on them waits for a moment, and sees no error.
    """
    if cache_dir == "":
        raise UsageError("--cache-dir: expected a directory, found nothing")
    if file is not None:
        os.environ[FILE_VARIABLE] = os.path.realpath(file)   # the processes to come read the same one
    context.obj = lambda: _settings(cache_dir, hang_timeout)
    if context.invoked_subcommand is None:
        _become_keeper(context.obj())


def _settings(cache_dir: str | None, hang_s: float | None) -> dict[str, Any]:
    """What the keeper is told (node.keeper.Keeper); `asked`: what must not differ from a daemon that runs."""
    from lazyfs import config  # noqa: PLC0415 - asking a daemon needs none

    found = config.load()
    asked = {"cache_dir": cache_dir} if cache_dir is not None else (
        {"cache_dir": found.daemon.cache_dir} if "daemon.cache_dir" in found.origins else {})
    return {
        "cache_dir": os.path.realpath(cache_dir if cache_dir is not None else found.daemon.cache_dir),
        "hang_s": found.daemon.hang_s if hang_s is None else hang_s,
        "start_s": found.daemon.start_timeout_s,
        "abort_s": found.daemon.abort_s,
        "worker": {"config": config.to_plain(found)},
        "asked": {name: os.path.realpath(path) for name, path in asked.items()},
    }


@daemon_command.command("status")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status_command(*, as_json: bool) -> None:
    """Show who serves. Exit code 0: ready."""
    from lazyfs.node.keeperasking import ask_keeper  # noqa: PLC0415
    from lazyfs.node.protocol import HEALTH, LIST, ControlClient, WorkerGoneError  # noqa: PLC0415

    directory = _directory()
    status: dict[str, Any] = ask_keeper(directory, "status")
    try:
        with ControlClient.connect(directory.socket) as client:
            status["health"] = client.request(HEALTH, 5.0)
            status["mounts"] = client.request(LIST, 5.0)
    except WorkerGoneError as error:
        status["health"] = {"ready": False, "reason": f"nobody answers at {directory.socket} ({error})"}
    except LazyfsError as error:
        status["health"] = {"ready": False, "reason": str(error)}
    if status["health"]["ready"] and not status["ready"]:   # its start was waited for, by asking it
        status.update(ask_keeper(directory, "status"))
    ready = status["ready"] and status["health"]["ready"]
    if as_json:
        print(json.dumps(status, indent=2))
    else:
        _print_status(status)
    sys.exit(0 if ready else HostError.exit_code)


@daemon_command.command("dump")
def dump_command() -> None:
    """
    Show what the worker is doing at this moment: threads, tasks, reads that wait, chunks on their way.

    Nothing stops. A worker that does not answer writes the same to its log on SIGUSR1 (kill -USR1), the keeper too.
    """
    from lazyfs.cli.output import printable  # noqa: PLC0415
    from lazyfs.node.protocol import DUMP, ControlClient, WorkerGoneError  # noqa: PLC0415

    directory = _directory()
    try:
        with ControlClient.connect(directory.socket) as client:
            for line in client.request(DUMP, _DUMP_S)["lines"]:
                print(printable(line))
    except WorkerGoneError as error:
        raise TargetError(f"nobody answers at {directory.socket} ({error})", hint="start it: lazyfs daemon") from None


@daemon_command.command("upgrade")
@click.pass_context
def upgrade_command(context: click.Context) -> None:
    """Go on with the version of lazyfs that is installed now."""
    from lazyfs.node.keeperasking import ANSWER_S, ask_keeper  # noqa: PLC0415

    settings = context.obj()
    timeout_s = max(ANSWER_S, 2 * settings["start_s"])   # a worker that does not load in time is given up before
    print(f"worker {ask_keeper(_directory(), 'upgrade', timeout_s, settings=settings)['worker']} serves")


@daemon_command.command("stop")
def stop_command() -> None:
    """End the daemon. Its worker goes on as long as there are mounts; `lazyfs umount --all` before ends these."""
    from lazyfs.node.keeperasking import ask_keeper  # noqa: PLC0415 - running a daemon asks nobody

    ask_keeper(_directory(), "stop")


def _become_keeper(settings: dict[str, Any]) -> NoReturn:
    from lazyfs.cache.ownership import prepare_directory  # noqa: PLC0415 - asking a daemon needs none

    if os.geteuid() != 0:
        raise HostError("the daemon needs root: it mounts", hint="run it with sudo")
    directory = _directory()
    if not directory.records():   # else readers wait, and whatever is wrong with the cache is told in the log
        prepare_directory(Path(settings["cache_dir"]))
    directory.create()
    words = [sys.executable, "-m", "lazyfs.node.keeper", json.dumps({"root": str(directory.root), **settings})]
    sys.stdout.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execv(sys.executable, words)  # noqa: S606


def _directory() -> WorkerDir:
    from lazyfs.node.rundir import daemon_dir  # noqa: PLC0415

    return daemon_dir()


def _print_status(status: dict[str, Any]) -> None:
    health = status["health"]
    print(f"keeper {status['keeper']}, worker {status['worker']} ({status['turns']} since the start)")
    if not (health["ready"] and status["ready"]):
        print(f"not ready: {health.get('reason', 'the worker is starting or ending')}")
        return
    print(f"version {health['version']}, {health['mounts']} mounts, {health['detached']} detached")
    for mount in status.get("mounts", []):
        done = "complete" if mount["complete"] else f"{mount['touched_stored_bytes'] / 1e6:.1f} MB touched"
        if plan := mount.get("prefetch_plan"):
            done += f", {mount['prefetched_chunks']} chunks ahead ({plan})"
        print(f"  {mount['target']}  {mount['image']}  {mount['driver']}, {done}")
    for source in health.get("sources", []):
        since = f" since {time.strftime('%F %T', time.localtime(source['since']))}" if source["since"] else ""
        print(f"  source {source['source']}: {source['state']}{since}{': ' if source['why'] else ''}{source['why']}")
    for broken in health["broken"]:
        print(f"  broken: {broken['target']}  {broken['image']}: {broken['reason']}")
