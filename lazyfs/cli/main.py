"""
The `lazyfs` command: finds the subcommand, and turns whatever happens into one clear line and an exit code.

Subcommands are imported only when they are asked for (start-up time counts: `lazyfs mount` must not import what
`lazyfs convert` needs). Who calls: the console script, `python -m lazyfs`. Exit codes: lazyfs.errors; 130 after ^C,
143 after SIGTERM, 141 when nobody reads our output any more.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from lazyfs import __version__
from lazyfs.cli.lazygroup import LazyGroup
from lazyfs.errors import BugError, DiskFullError, HostError, LazyfsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE

# name -> (module:attribute, one line for the overview; told here so that --help imports none of them)
COMMANDS = {
    "convert": ("lazyfs.cli.convert:convert_command", "Make a lazy image out of an OCI or Docker image."),
    "optimize": ("lazyfs.cli.optimize:optimize_command", "Give a lazy image another hot part; its layers stay."),
    "mount": ("lazyfs.cli.mount:mount_command", "Mount a lazy image on a directory."),
    "umount": ("lazyfs.cli.mount:umount_command", "Unmount a lazy image."),
    "daemon": ("lazyfs.cli.daemon:daemon_command", "Serve all lazy images of this node; survive crashes and upgrades."),
    "status": ("lazyfs.cli.status:status_command", "Show what this node is doing: reads, sources, cache, mounts."),
    "trace": ("lazyfs.cli.trace:trace_command", "Show reads that were slow, and why."),
    "metrics": ("lazyfs.cli.metrics:metrics_command", "Print this node's metrics, as Prometheus reads them."),
    "snapshotter": ("lazyfs.cli.snapshotter:snapshotter_command", "Serve containerd's snapshots; lazy images too."),
    "mirror": ("lazyfs.cli.mirror:mirror_command", "Serve ordinary images to this node's container runtime."),
    "tracker": ("lazyfs.cli.tracker:tracker_command", "Tell the nodes of clusters of each other."),
    "peers": ("lazyfs.cli.peers:peers_command", "Show with whom this node shares chunks, and how that goes."),
    "config": ("lazyfs.cli.config:config_command", "Check or show the configuration."),
    "cache": ("lazyfs.cli.cache:cache_command", "Show what is cached on this node; make room."),
    "pull": ("lazyfs.cli.pull:pull_command", "Pull an image into containerd, lazily."),
    "doctor": ("lazyfs.cli.doctor:doctor_command", "Look at everything a node needs, and say what to do."),
    "inspect": ("lazyfs.cli.inspect:inspect_command", "Show what a lazy image is made of."),
    "preheat": ("lazyfs.cli.preheat:preheat_command", "Have nodes of the cluster fetch an image ahead."),
    "get": ("lazyfs.cli.get:get_command", "Get a file behind a URL, through this cluster's nodes."),
    "profile": ("lazyfs.cli.profile:profile_command", "Show, merge, compare and check prefetch lists."),
    "sign": ("lazyfs.cli.sign:sign_command", "Sign an image, as cosign does."),
    "verify": ("lazyfs.cli.sign:verify_command", "Say whether an image is signed by one of some keys."),
    "check": ("lazyfs.cli.check:check_command", "Verify a lazy image, also against its source image."),
}


class Terminated(BaseException):
    """SIGTERM arrived. No LazyfsError, no Exception: only clean-up (`finally`, `with`) runs on its way out."""


@click.group(
    name="lazyfs",
    cls=LazyGroup,
    places=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="'lazyfs COMMAND --help' shows a command's options, with examples.",
)
@click.version_option(__version__, "--version", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, envvar="LAZYFS_DEBUG", help="Show tracebacks of errors.")
def group(debug: bool) -> None:
    """
    Start containers before their image is there.

    IMAGE, SRC and DST are written as for skopeo: docker://HOST/REPO:TAG (or without docker://),
    oci:DIR:TAG, oci-archive:FILE, docker-archive:FILE.
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit the process with its code."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")   # numpy would start threads that nothing here uses
    signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        code = group.main(args, prog_name="lazyfs", standalone_mode=False)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001  (the last frame: everything becomes an exit code)
        code = report(error, debug=_wants_debug(args))
    sys.exit(code if isinstance(code, int) else 0)


def report(error: BaseException, *, debug: bool) -> int:
    """Tell the user about `error` on stderr; returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if debug and not isinstance(error, click.exceptions.Exit):
        traceback.print_exception(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return EXIT_INTERRUPTED
    if isinstance(error, Terminated):
        return EXIT_TERMINATED
    if isinstance(error, BrokenPipeError):
        _forget_stdout()
        return EXIT_BROKEN_PIPE
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.exceptions.NoArgsIsHelpError):   # a group without its command: this is its help
        print(error.format_message(), file=sys.stderr)
    else:
        error = as_lazyfs_error(error)
        print_error(error)
    return error.exit_code


def as_lazyfs_error(error: BaseException) -> LazyfsError:
    """What is not yet of our tree: click's errors, the operating system's, and bugs."""
    if isinstance(error, LazyfsError):
        return error
    if isinstance(error, click.ClickException):
        return _usage_error(error)
    if isinstance(error, OSError) and error.errno is not None:
        return _system_error(error, error.errno)
    if isinstance(error, MemoryError):
        return LazyfsError("out of memory", hint="try again with --jobs 1")
    return _bug_error(error)


def print_error(error: LazyfsError) -> None:
    """Write the error line, and its hint, to stderr."""
    print(f"lazyfs: error: {_one_line(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {_one_line(error.hint)}", file=sys.stderr)


def _system_error(error: OSError, number: int) -> LazyfsError:
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    text = f"{where}{os.strerror(number)}"
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(text, hint="free some space there, then run the same command again")
    if isinstance(error, PermissionError) and os.geteuid() != 0:
        return HostError(text, hint="run it as root: sudo lazyfs ...")
    return LazyfsError(text, hint="run with --debug before the command to see where this comes from")


def _usage_error(error: click.ClickException) -> LazyfsError:
    command = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lazyfs"
    known = LazyfsError(error.format_message(), hint=f"'{command} --help' shows what is possible")
    known.exit_code = error.exit_code  # type: ignore[misc]
    return known


def _bug_error(error: BaseException) -> BugError:
    """An exception that nobody expected: keep its traceback where the user can find it."""
    text = f"unexpected {type(error).__name__}: {str(error)[:200]}"
    try:
        descriptor, path = tempfile.mkstemp(prefix="lazyfs-bug-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"lazyfs {__version__}, Python {sys.version}\n")
            traceback.print_exception(error, file=file)
    except OSError:
        return BugError(text, hint="please report this; run again with 'lazyfs --debug' to see where it comes from")
    return BugError(text, hint=f"please report this, with the file {path}")


def _one_line(text: str) -> str:
    """Names from archives may hold line ends and terminal codes: show them escaped."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _wants_debug(args: Sequence[str]) -> bool:
    """The group's own options come before the subcommand's name."""
    own = args[: next((index for index, word in enumerate(args) if not word.startswith("-")), len(args))]
    return "--debug" in own or os.environ.get("LAZYFS_DEBUG", "").lower() in ("1", "true", "yes", "on")


def _raise_terminated(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    signal.signal(signal.SIGTERM, signal.SIG_IGN)   # once is enough: a second one must not cut the clean-up short
    raise Terminated


def _forget_stdout() -> None:
    """Nobody reads it any more: the interpreter's own flush at exit must not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
