"""`lazyfs profile check LIST IMAGE`: what of a list an image has. Thin; the work is in lazyfs.profile.coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, print_json
from lazyfs.cli.profile_inputs import Images, Inputs, json_option
from lazyfs.errors import ProfileDiffersError
from lazyfs.profile.coverage import cover

if TYPE_CHECKING:
    from lazyfs.profile.coverage import Coverage
    from lazyfs.registry import RegistryOptions

_LINE_COUNT = 20
_EPILOG = """\b
Examples:
  lazyfs profile check start.txt registry.example/app:2-lazy
  lazyfs profile check start.txt oci:/srv/images:web --min-coverage 0.9 --json

\b
Exit codes:
  0   it was looked for
  56  less was found than --min-coverage
"""


@click.command("check", epilog=_EPILOG)
@click.argument("list_name", metavar="LIST")
@click.argument("image", metavar="IMAGE")
@json_option
@click.option("--min-coverage", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Fail if less of the list's bytes is in the image, for example 0.9.")
@platform_option
@registry_options
def check_command(
    list_name: str, image: str, *, as_json: bool, min_coverage: float | None, platform: str | None,
    registry: RegistryOptions,
) -> None:
    """
    Look for LIST's files in the lazy image IMAGE, often a later build of the one it was recorded from.

    Says which files are gone, which are shorter than the list's ranges, how much of the list's bytes is there, and
    the chunks that hold it. Of a file that changed but not its name and size, the list cannot tell.
    """
    images = Images(registry, platform)
    coverage = cover(Inputs(images).load_list(list_name), images.files(image))
    if as_json:
        print_json({"list": list_name, "image": image, **coverage.as_json()})
    else:
        _print(coverage)
    if min_coverage is not None and coverage.share < min_coverage:
        raise ProfileDiffersError(f"{image} has {coverage.share:.3f} of what {list_name} names, expected "
                                  f"{min_coverage:g}", hint="record a new list from this image")


def _print(coverage: Coverage) -> None:
    chunks = coverage.chunks
    click.echo(f"coverage  {coverage.share:.3f}  ({format_bytes(coverage.matched_bytes)} of "
               f"{format_bytes(coverage.stated_bytes)}; {coverage.line_count - len(coverage.missing)} of "
               f"{coverage.line_count} lines)")
    click.echo(f"chunks    {chunks.count}, {format_bytes(chunks.size_bytes)}, "
               f"{format_bytes(chunks.stored_bytes)} stored")
    told = [f"gone      {line}" for line in coverage.missing]
    told += [f"shorter   {line}{f' (by {format_bytes(size)})' if size else ''}" for line, size in coverage.cut]
    for line in told[:_LINE_COUNT]:
        click.echo(line)
    if len(told) > _LINE_COUNT:
        click.echo(f"and {len(told) - _LINE_COUNT} more (--json shows all)")
