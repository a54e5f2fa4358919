"""
The words of `lazyfs convert --profile-run`: which there are, and which go together.

Layer: cli. Cheap to import. Who calls: cli.convert, whose start-up time counts; the work is in cli.convert_profiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from lazyfs.cli.profile_run import run_options
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

_RUNS_MAX = 100
_OWN = ("runs", "min_share", "list_file")
_RUN = ("until_exit", "for_time", "until_log", "until_http", "until_port", "timeout", "grace", "net", "env", "user",
        "workdir", "entrypoint", "mounts")


def profile_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add them; the command gets them as keywords."""
    command = run_options(command)
    for option in reversed((
        click.option("--profile-run", is_flag=True,
                     help="Run the image, and make what its start reads the hot part; options and COMMAND as for "
                          "'lazyfs profile run':"),
        click.option("--runs", type=click.IntRange(1, _RUNS_MAX), default=1, show_default=True, metavar="N",
                     help="Start it so many times."),
        click.option("--min-share", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
                     help="Leave out what a smaller share of the runs read."),
        click.option("--list", "list_file", metavar="FILE", help="Write the prefetch list there, too."),
    )):
        command = option(command)
    return command


def wants_profile(words: dict[str, Any], command: tuple[str, ...]) -> bool:
    """
    Whether --profile-run was given.

    Raises:
        UsageError: it was not, but others that only it understands; or it was with what does not go together with it.

    """
    context = click.get_current_context()
    if words["profile_run"]:
        if words["prefetch"] is not None:
            raise UsageError("--prefetch and --profile-run exclude each other", hint="leave one of them out")
        if words["list_file"] == "-":
            raise UsageError("--list: standard output is for the result", hint="name a file")
        return True
    given = [name for name in (*_OWN, *_RUN) if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    if given or command:
        told = next((option.opts[0] for option in context.command.params if option.name in given[:1]), "COMMAND")
        raise UsageError(f"{told} says how to run the image, which is done with --profile-run only",
                         hint="add --profile-run, or leave it out")
    return False
