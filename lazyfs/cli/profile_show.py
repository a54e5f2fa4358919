"""`lazyfs profile show LIST`: what a list wants, for people, as JSON, or drawn. Thin; the work is in lazyfs.profile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.cli.profile_inputs import Images, Inputs, image_option, json_option
from lazyfs.errors import UsageError
from lazyfs.profile.picture import page, svg
from lazyfs.profile.summary import as_lines, summarize

if TYPE_CHECKING:
    from lazyfs.registry import RegistryOptions

_EPILOG = """\b
Examples:
  lazyfs profile show start.txt
  lazyfs profile show start.txt --image oci:/srv/images:web --svg start.svg
  lazyfs profile show run1.json --html - > run1.html
"""


@click.command("show", epilog=_EPILOG)
@click.argument("list_name", metavar="LIST")
@image_option
@json_option
@click.option("--svg", "svg_name", metavar="FILE", help="Draw it: bytes by time, by file, by layer ('-': stdout).")
@click.option("--html", "html_name", metavar="FILE", help="The same in a page with a table of files ('-': stdout).")
@click.option("--top", "top_count", type=click.IntRange(0), default=10, show_default=True, metavar="N",
              help="How many files to print.")
@platform_option
@registry_options
def show_command(
    list_name: str, *, image: str | None, as_json: bool, svg_name: str | None, html_name: str | None, top_count: int,
    platform: str | None, registry: RegistryOptions,
) -> None:
    """
    Show what LIST wants: totals, shares, layers, the largest files, a time line.

    With --image, also files of globs, sizes of whole files, and the chunks that hold it all.
    """
    if svg_name == html_name == "-" or (as_json and "-" in (svg_name, html_name)):
        raise UsageError("only one thing can go to standard output", hint="name files for the others")
    loaded = Inputs(Images(registry, platform)).load(list_name, image)
    summary = summarize(loaded.profile, loaded.files)
    for name, draw in ((svg_name, svg), (html_name, page)):
        if name is not None:
            write_output(name, draw(summary, format_bytes))
            if name != "-":
                note(f"{name}: written")
    if as_json:
        print_json(summary.as_json())
    elif "-" not in (svg_name, html_name):
        click.echo("\n".join(as_lines(summary, format_bytes, top_count)))
