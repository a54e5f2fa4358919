"""`lazyfs profile diff A B`: what two lists have in common. Thin; the work is in lazyfs.profile.diff."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, print_json
from lazyfs.cli.profile_inputs import Images, Inputs, image_option, json_option
from lazyfs.errors import ProfileDiffersError
from lazyfs.image.prefetch import format_pattern
from lazyfs.profile.diff import compare

if TYPE_CHECKING:
    from lazyfs.profile.diff import Difference
    from lazyfs.registry import RegistryOptions

_EPILOG = """\b
Examples:
  lazyfs profile diff old.txt new.txt
  lazyfs profile diff run1.json run2.json --min-agreement 0.95
  git show HEAD:start.txt | lazyfs profile diff - start.txt --json

\b
Exit codes:
  0   they were compared
  56  they agree less than --min-agreement
"""


@click.command("diff", epilog=_EPILOG)
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@image_option
@json_option
@click.option("--min-agreement", type=click.FloatRange(0, 1), metavar="SHARE",
              help="Fail if common bytes / bytes of either are less, for example 0.95.")
@click.option("--top", "top_count", type=click.IntRange(0), default=10, show_default=True, metavar="N",
              help="How many files to print.")
@platform_option
@registry_options
def diff_command(
    first: str, second: str, *, image: str | None, as_json: bool, min_agreement: float | None, top_count: int,
    platform: str | None, registry: RegistryOptions,
) -> None:
    """
    Compare two lists or recordings: bytes that both want, bytes that one wants, and the order.

    With --image, globs and whole files are compared by the files and sizes of that image.
    """
    inputs = Inputs(Images(registry, platform))
    difference = compare(inputs.load(first, image).profile, inputs.load(second, image).profile)
    if as_json:
        print_json({"a": first, "b": second, **difference.as_json()})
    else:
        _print(difference, top_count)
    if min_agreement is not None and difference.agreement < min_agreement:
        raise ProfileDiffersError(f"the lists agree in {difference.agreement:.3f} of their bytes, expected "
                                  f"{min_agreement:g}", hint="more runs in each make lists more alike")


def _print(difference: Difference, top_count: int) -> None:
    total = difference.total
    click.echo(f"agreement  {difference.agreement:.3f}  ({format_bytes(total.common)} common, "
               f"{format_bytes(total.only_a)} only A, {format_bytes(total.only_b)} only B)")
    click.echo(f"A in B     {difference.covered_a:.3f}\nB in A     {difference.covered_b:.3f}")
    if difference.order is not None:
        click.echo(f"order      {difference.order:.3f}  (rank correlation of the common ranges)")
    if total.open_count:
        click.echo(f"and {total.open_count} ranges whose size only the image knows (--image IMAGE)")
    differing = [(pattern, one) for pattern, one in difference.files if one.differing]
    if differing and top_count:
        click.echo("\n  only A    only B    common  file")
    for pattern, one in differing[:top_count]:
        sizes = "  ".join(f"{format_bytes(size):>8}" for size in (one.only_a, one.only_b, one.common))
        click.echo(f"{sizes}  {format_pattern(pattern)}")
    if len(differing) > top_count:
        click.echo(f"and {len(differing) - top_count} more files that differ")
