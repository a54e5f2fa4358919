"""
`lazyfs profile`: the commands around prefetch lists. Each is a module of its own, imported when it is used.

Layer: cli. The work is done by lazyfs.profile.
"""

from __future__ import annotations

import click

from lazyfs.cli.lazygroup import LazyGroup

_PLACES = {
    "run": ("lazyfs.cli.profile_run:run_command", "Run an image, and list what its start reads."),
    "record": ("lazyfs.cli.profile_record:record_command", "List what running containers read."),
    "collected": ("lazyfs.cli.profile_collected:collected_command", "Lists made of what nodes have sent."),
    "show": ("lazyfs.cli.profile_show:show_command", "Totals, largest files and time line, as text or as a picture."),
    "merge": ("lazyfs.cli.profile_merge:merge_command", "Several runs, or lists, become one list."),
    "diff": ("lazyfs.cli.profile_diff:diff_command", "What two lists have in common, and in which order."),
    "check": ("lazyfs.cli.profile_check:check_command", "What of a list an image still has."),
    "push": ("lazyfs.cli.profile_push:push_command", "Put a list beside its image, in the registry."),
    "pull": ("lazyfs.cli.profile_push:pull_command", "Get the list that is beside an image."),
}
_EPILOG = """\b
Examples:
  lazyfs profile run registry.example/app:lazy --until-port 80 --runs 3 -o start.txt
  lazyfs profile record registry.example/app:lazy -o start.txt
  lazyfs profile show start.txt
  lazyfs profile show start.json --html start.html
  lazyfs profile merge run1.json run2.json run3.json -o start.txt
  lazyfs profile diff old.txt new.txt
  lazyfs profile check start.txt registry.example/app:2-lazy --min-coverage 0.9
  lazyfs profile push start.txt registry.example/app:lazy

'lazyfs profile COMMAND --help' shows a command's options.
"""


@click.group("profile", cls=LazyGroup, places=_PLACES, epilog=_EPILOG, short_help="Prefetch lists: show, merge, diff.")
def profile_command() -> None:
    """
    Work with what starts read: prefetch lists and recordings.

    LIST is a prefetch list (text) or a recording (JSON), '-': standard input. A recording tells byte ranges of layers;
    which files those are, the image says that it names (or that --image names).
    """
