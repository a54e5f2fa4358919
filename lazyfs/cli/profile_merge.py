"""`lazyfs profile merge LIST...`: one list out of several runs. Thin; the work is in lazyfs.profile.merge."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lazyfs import __version__
from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, note
from lazyfs.cli.outputfile import write_output
from lazyfs.cli.profile_inputs import Images, Inputs, image_option
from lazyfs.errors import UsageError
from lazyfs.image.prefetch import format_prefetch
from lazyfs.profile.merge import merge
from lazyfs.profile.parts import Profile, list_of

if TYPE_CHECKING:
    from lazyfs.registry import RegistryOptions

_MADE_CHARS_MAX = 1000
_EPILOG = """\b
Examples:
  lazyfs profile merge run1.json run2.json run3.json -o start.txt
  lazyfs profile merge --min-share 0.5 start.txt run4.json > start.new
  lazyfs profile merge run1.json --image oci:/srv/images:web -o start.txt
"""


@click.command("merge", epilog=_EPILOG)
@click.argument("list_names", metavar="LIST...", nargs=-1, required=True)
@click.option("-o", "--output", metavar="FILE", default="-", help="Where the list goes.  [default: stdout]")
@click.option("--min-share", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
              help="Leave out what a smaller share of the runs touched, for example 0.5.")
@click.option("--made", metavar="TEXT", default="", help="Note this in the list's header, for example a date.")
@image_option
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors.")
@platform_option
@registry_options
def merge_command(
    list_names: tuple[str, ...], *, output: str, min_share: float, made: str, image: str | None, quiet: bool,
    platform: str | None, registry: RegistryOptions,
) -> None:
    """
    Merge recordings and lists into one list; of one recording, make its list.

    Ranges come in the order of their median rank over the runs that touched them; a range that not all touched has a
    share. A list of n runs counts n times. The same input gives the same list, byte for byte.
    """
    if not made.isprintable() or len(made) > _MADE_CHARS_MAX:
        raise UsageError(f"--made: expected one line of at most {_MADE_CHARS_MAX} characters",
                         hint='for example --made "$(date -u +%F)"')
    inputs = Inputs(Images(registry, platform))
    profiles = [inputs.load(name, image).profile for name in list_names]
    named = sorted({profile.header.image for profile in profiles} - {""})
    if len(named) > 1 and not quiet:
        note(f"warning: these are runs of different images: {named[0]}, {named[1]}")
    merged = merge(profiles, min_share)
    header = replace(merged.header, image=merged.header.image or image or "", tool=f"lazyfs {__version__}",
                     made=made.strip())
    made_list = list_of(Profile(merged.parts, header))
    write_output(output, format_prefetch(made_list))
    if not quiet:
        note(f"{len(made_list.entries)} lines of {header.runs} run{'s' * (header.runs != 1)}, "
             f"{format_bytes(merged.size_bytes)}")
