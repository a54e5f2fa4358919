"""
`lazyfs profile run IMAGE [-- COMMAND...]`: run an image, write the prefetch list of what its start read.

Layer: cli; thin: the work is in lazyfs.runner and lazyfs.profile, imported inside the command. The list goes to stdout
or a file, everything else (what the program says, too) to stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.errors import TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lazyfs.profile.parts import Profile
    from lazyfs.registry import RegistryOptions
    from lazyfs.runner.rules import StopRules
    from lazyfs.runner.session import Recorded, Run, RunOrder

_RUNS_MAX = 100
_EPILOG = """\b
Examples:
  lazyfs profile run registry.example/app:lazy -o app.prefetch
  lazyfs profile run registry.example/web:lazy --until-port 80 --runs 3 -o web.prefetch
  lazyfs profile run registry.example/web:lazy --until-http http://localhost/healthz > web.prefetch
  lazyfs profile run registry.example/db:lazy --until-log 'ready to accept' --env PASSWORD=x --timeout 2m
  lazyfs profile run oci:/srv/images:tool-lazy -- python3 -c 'import numpy'

\b
Then: lazyfs optimize registry.example/app:lazy --prefetch app.prefetch

\b
Exit codes:
  60  the program failed, or could not be started      61  it did not become ready in its time
"""


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What says how to run, and until when. The command gets them as keywords."""
    for option in reversed((
        click.option("--until-exit", is_flag=True, help="Until the program ends: the default."),
        click.option("--for", "for_time", metavar="TIME", help="For so long, for example 30s."),
        click.option("--until-log", metavar="REGEX", help="Until a line of its output matches."),
        click.option("--until-http", metavar="URL", help="Until this answers with a status below 400."),
        click.option("--until-port", type=click.IntRange(1, 65535), metavar="N",
                     help="Until it listens on this TCP port."),
        click.option("--timeout", default="10m", show_default=True, metavar="TIME",
                     help="A run that takes longer has failed."),
        click.option("--grace", default="10s", show_default=True, metavar="TIME",
                     help="From the image's stop signal to SIGKILL."),
        click.option("--net", type=click.Choice(["none", "host"]), default="none", show_default=True,
                     help="none: a network of its own, with loopback only."),
        click.option("--env", "-e", "env", multiple=True, metavar="NAME[=VALUE]",
                     help="Set a variable; without a value it is taken from this environment. Repeatable."),
        click.option("--user", metavar="USER[:GROUP]", help="Run as this user.  [default: the image's]"),
        click.option("--workdir", metavar="DIR", help="Start in this directory.  [default: the image's]"),
        click.option("--entrypoint", metavar="PROGRAM", help="Run this program instead of the image's entrypoint."),
        click.option("--mount", "mounts", multiple=True, metavar="SPEC",
                     help="type=bind,src=DIR,dst=DIR[,ro] or type=tmpfs,dst=DIR. Repeatable."),
    )):
        command = option(command)
    return command


@click.command("run", epilog=_EPILOG, short_help="Run an image, and list what its start reads.")
@click.argument("image")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
@click.option("--output", "-o", metavar="FILE", default="-", help="Where the list goes.  [default: standard output]")
@click.option("--runs", type=click.IntRange(1, _RUNS_MAX), default=1, show_default=True, metavar="N",
              help="Start it so many times, each time on a fresh mount, and merge what was read.")
@click.option("--min-share", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
              help="Leave out what a smaller share of the runs read.")
@run_options
@click.option("--keep-failed", is_flag=True, help="Write the list even if the program fails or is late.")
@click.option("--cache-dir", metavar="DIR", help="Keep fetched data here.  [default: an empty directory for each call]")
@click.option("--driver", type=click.Choice(["auto", "erofs", "fuse"]), default="auto", show_default=True,
              help="As for lazyfs mount.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; needs --output.")
@click.option("--quiet", "-q", is_flag=True, help="Do not show what the program says.")
@platform_option
@registry_options
def run_command(
    image: str, command: tuple[str, ...], *, output: str, runs: int, min_share: float, keep_failed: bool,
    cache_dir: str | None, driver: str, as_json: bool, quiet: bool, platform: str | None, registry: RegistryOptions,
    **words: Any,
) -> None:
    """
    Run a lazy image, and write the prefetch list of what its start reads.

    Runs the image's program (or COMMAND, which follows the image's entrypoint) by runc on a lazy mount of its own,
    until a stop rule is met: the first of those given. Then the program is stopped, and nothing is left but the list.
    """
    if as_json and output == "-":
        raise UsageError("--json and the list cannot both go to standard output", hint="add --output FILE")
    check_output(output)
    from lazyfs.image.prefetch import format_prefetch  # noqa: PLC0415
    from lazyfs.profile.parts import list_of  # noqa: PLC0415

    order = make_order(image, command, registry, words, runs=runs, keep_failed=keep_failed, driver=driver,
                       cache_dir=None if cache_dir is None else os.path.realpath(cache_dir), platform=platform)
    recorded, profile = record_list(order, image, min_share=min_share, quiet=quiet)
    write_output(output, format_prefetch(list_of(profile)))
    if as_json:
        print_json(run_json(recorded, profile, output))
    else:
        note(f"{len(profile.parts)} ranges of files, {format_bytes(profile.size_bytes)}, of {recorded.image}")


def make_order(
    image: str, command: tuple[str, ...], registry: RegistryOptions, words: dict[str, Any], **fields: Any
) -> RunOrder:
    """What to run; `words`: those of run_options(), `fields`: others of RunOrder. Raises UsageError."""
    from lazyfs.cli.mount import absolute_image  # noqa: PLC0415
    from lazyfs.registry.fields import default_auth_file, to_fields  # noqa: PLC0415
    from lazyfs.runner.session import RunOrder  # noqa: PLC0415

    known = to_fields(replace(registry, auth_file=registry.auth_file or default_auth_file()))
    return _with_words(RunOrder(absolute_image(image, str(Path.cwd())), command, registry=known, **fields), words)


def record_list(order: RunOrder, image: str, *, min_share: float, quiet: bool) -> tuple[Recorded, Profile]:
    """Run it, saying what goes on; all runs, and what they read, merged. `image`: its name for people."""
    from lazyfs.runner.output import printable  # noqa: PLC0415
    from lazyfs.runner.session import record_runs  # noqa: PLC0415

    note(f"running {image} {order.rules.describe()}, at most {order.rules.timeout_s:g} s")
    with _hangup_terminates():
        recorded = record_runs(
            order, on_line=lambda line: None if quiet else note(f"| {printable(line)}"),
            on_run=lambda number, run: note(_run_line(number, order.runs, run)))
    return recorded, _merged(recorded, min_share)


def _with_words(order: RunOrder, words: dict[str, Any]) -> RunOrder:
    """The options of run_options(), checked."""
    from lazyfs.runner.imageconfig import check_environment, check_words  # noqa: PLC0415
    from lazyfs.runner.spec import ExtraMount, Network  # noqa: PLC0415

    workdir, entrypoint = words["workdir"], words["entrypoint"]
    if workdir is not None and not workdir.startswith("/"):
        raise UsageError(f"--workdir {workdir!r:.100} is not absolute")
    if entrypoint is not None:
        check_words((entrypoint,), "--entrypoint")
    return replace(
        order, env=check_environment(tuple(map(_variable, words["env"]))), user=words["user"], cwd=workdir,
        entrypoint=None if entrypoint is None else (entrypoint,), network=Network(words["net"]),
        mounts=tuple(map(ExtraMount.parse, words["mounts"])), rules=_rules(words))


def _rules(words: dict[str, Any]) -> StopRules:
    from lazyfs.runner.rules import StopRules, parse_duration, parse_http, parse_pattern  # noqa: PLC0415

    def made(name: str, parse: Callable[[str], Any]) -> Any:
        return None if words[name] is None else parse(words[name])

    rules = StopRules(
        made("for_time", parse_duration), made("until_log", parse_pattern), made("until_http", parse_http),
        words["until_port"], parse_duration(words["timeout"]), parse_duration(words["grace"]))
    if words["until_exit"] and not rules.until_exit:
        raise UsageError("--until-exit: the other stop rules end the run before", hint="leave one of them out")
    if rules.for_s is not None and rules.for_s > rules.timeout_s:
        raise UsageError(f"--for {rules.for_s:g} s is longer than the --timeout of {rules.timeout_s:g} s")
    return rules


def _variable(text: str) -> str:
    if "=" in text:
        return text
    value = os.environ.get(text)
    if value is None:
        raise UsageError(f"--env {text!r:.60}: this environment has no such variable", hint="say --env NAME=VALUE")
    return f"{text}={value}"


def _merged(recorded: Recorded, min_share: float) -> Profile:
    from lazyfs.profile.files import profile_of_recording  # noqa: PLC0415
    from lazyfs.profile.merge import merge  # noqa: PLC0415
    from lazyfs.runner.recording import TOOL  # noqa: PLC0415

    profile = merge([profile_of_recording(run.recording, recorded.files) for run in recorded.runs], min_share)
    return replace(profile, header=replace(profile.header, image=recorded.image, tool=TOOL))


def _run_line(number: int, count: int, run: Run) -> str:
    ended = "" if run.outcome.exit_code is None else f" with exit code {run.outcome.exit_code}"
    kept = " (kept: --keep-failed)" if run.failure else ""
    cut = "; it read more than can be recorded" if run.recording.truncated else ""
    return f"run {number} of {count}: {run.outcome.elapsed_s:.2f} s: {run.outcome.reason}{ended}{kept}{cut}"


def run_json(recorded: Recorded, profile: Profile, output: str) -> dict[str, Any]:
    """A contract: names are only added."""
    return {
        "image": recorded.image,
        "list": output,
        "ranges": len(profile.parts),
        "fileBytes": profile.size_bytes,
        "runs": [
            {"seconds": round(run.outcome.elapsed_s, 3), "ended": run.outcome.ending.value,
             "reason": run.outcome.reason, "exitCode": run.outcome.exit_code, "failure": run.failure,
             "touches": len(run.recording.touches), "truncated": run.recording.truncated}
            for run in recorded.runs
        ],
    }


@contextlib.contextmanager
def _hangup_terminates() -> Iterator[None]:
    """A terminal that is closed ends us as SIGTERM does: in order, with nothing left behind."""
    previous = signal.signal(signal.SIGHUP, signal.getsignal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, previous)


def check_output(output: str) -> None:
    """Before a run of minutes, not after it."""
    if output != "-" and not Path(output).absolute().parent.is_dir():
        raise TargetError(f"{output}: there is no such directory")
