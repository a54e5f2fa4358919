"""
`lazyfs profile collected [IMAGE]`: what nodes have contributed to this machine's collector. Thin; the work is in
lazyfs.node.contributions and lazyfs.profile.

Reads the collector's directory; its daemon need not run.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.errors import NotFoundError, TargetError, UsageError

if TYPE_CHECKING:
    from lazyfs.node.contributions import Contributions
    from lazyfs.registry import RegistryOptions

_EPILOG = """\b
Examples:
  lazyfs profile collected                                     what there is
  lazyfs profile collected registry.example/web:lazy -o web.prefetch --min-share 0.5
"""


@click.command("collected", epilog=_EPILOG, short_help="Lists made of what nodes have sent.")
@click.argument("image", required=False)
@click.option("--output", "-o", metavar="FILE", help="Write IMAGE's list there ('-': standard output, the default).")
@click.option("--min-share", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE",
              help="Leave out what a smaller share of the contributions has, for example 0.5.")
@click.option("--dir", "directory", metavar="DIR", help="Where they are.  [default: profile.collect_dir]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout; with IMAGE it needs --output.")
@platform_option
@registry_options
def collected_command(
    image: str | None, *, output: str | None, min_share: float, directory: str | None, as_json: bool,
    platform: str | None, registry: RegistryOptions,
) -> None:
    """
    Show which images have contributions; with IMAGE, merge its contributions into one prefetch list.

    A contribution counts as a run: a range's share says how many of the nodes have read it.
    """
    from lazyfs import config  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.contributions import Contributions  # noqa: PLC0415

    place = Path(directory or config.load().profile.collect_dir)
    try:
        found = Contributions(place)
    except OSError as error:
        raise TargetError(f"{place}: {error.strerror}", hint="it is for root only") from error
    if image is None:
        if output is not None:
            raise UsageError("--output is for the list of one IMAGE")
        _show(found, as_json=as_json)
        return
    if as_json and output in {None, "-"}:
        raise UsageError("--json and the list cannot both go to standard output", hint="add --output FILE")
    _write_list(found, image, output or "-", min_share, as_json=as_json, platform=platform, registry=registry)


def _show(found: Contributions, *, as_json: bool) -> None:
    rows: list[dict[str, Any]] = [
        {"key": key, "contributions": len(image), "bytes": sum(entry.size for entry in image.values()),
         "newest": max(entry.time_ns for entry in image.values()) / 1e9}
        for key, image in found.images.items()]
    rows.sort(key=lambda row: (-row["contributions"], row["key"]))
    if as_json:
        print_json({"images": rows})
        return
    for row in rows:
        newest = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["newest"]))
        size = format_bytes(row["bytes"])
        click.echo(f"{row['key'][:12]}  {row['contributions']:>3} contributions  {size:>8}  {newest}")
    if not rows:
        note("nothing was contributed yet")


def _write_list(found: Contributions, image: str, output: str, min_share: float, *, as_json: bool,
                platform: str | None, registry: RegistryOptions) -> None:
    from lazyfs.cli.profile_inputs import Images  # noqa: PLC0415
    from lazyfs.image.prefetch import format_prefetch  # noqa: PLC0415
    from lazyfs.profile.contribution import image_key, usable  # noqa: PLC0415
    from lazyfs.profile.merge import merge  # noqa: PLC0415
    from lazyfs.profile.parts import list_of  # noqa: PLC0415
    from lazyfs.runner.recording import TOOL  # noqa: PLC0415

    files = Images(registry, platform).files(image)
    key = image_key(files.digests)
    there = len(found.images.get(key, {}))
    profiles = usable(found.recordings(key), files)
    if not profiles:
        raise NotFoundError(f"{image}: no node has contributed to it ({key[:12]})",
                            hint="nodes send with profile.upload in their configuration; lazyfs profile collected")
    merged = merge(profiles, min_share)
    merged = replace(merged, header=replace(merged.header, image=image, tool=TOOL))
    write_output(output, format_prefetch(list_of(merged)))
    if len(profiles) < there:
        note(f"warning: {there - len(profiles)} of {there} contributions are damaged, or not of this image")
    if as_json:
        print_json({   # a contract: names are only added
            "key": key, "image": image, "list": output, "ranges": len(merged.parts), "fileBytes": merged.size_bytes,
            "contributions": len(profiles), "unusable": there - len(profiles)})
    else:
        note(f"{len(merged.parts)} ranges of files, {format_bytes(merged.size_bytes)}, "
             f"of {len(profiles)} contributions")
