"""
`lazyfs optimize IMAGE [DST]`: arguments, progress and result. The work is done by converter.optimize.

Layer: cli. Heavy imports happen inside the command.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import platform_option, processors, registry_options
from lazyfs.cli.output import Progress, format_bytes, make_progress, note, print_json
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from converter.optimize import OptimizedImage, OptimizeReport
    from lazyfs.image.digest import Digest
    from lazyfs.image.prefetch import PrefetchList
    from lazyfs.registry import RegistryOptions

_LINES_SHOWN = 10
_EXAMPLES = """
\b
Examples:
  lazyfs optimize registry.example/app:1-lazy --prefetch start.txt
  lazyfs optimize registry.example/app:1-lazy --prefetch start.txt registry.example/app:1-hot
  lazyfs optimize oci:/srv/images:web --no-prefetch
  lazyfs optimize registry.example/app:1-lazy --prefetch arm.txt --platform linux/arm64
"""


@click.command("optimize", epilog=_EXAMPLES)
@click.argument("image", metavar="IMAGE")
@click.argument("destination", metavar="[DST]", required=False)
@click.option("--prefetch", "list_name", metavar="LIST",
              help="A prefetch list, or a recording: what the hot part is to hold, in order ('-': stdin).")
@click.option("--no-prefetch", is_flag=True, help="Leave the image without a hot part.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors (and JSON).")
@functools.partial(platform_option, default="all of them")
@registry_options
def optimize_command(
    image: str, destination: str | None, *, list_name: str | None, no_prefetch: bool, as_json: bool, quiet: bool,
    platform: str | None, registry: RegistryOptions,
) -> None:
    """
    Give the lazy image IMAGE another hot part, at DST; without DST it takes IMAGE's own name.

    Nothing is converted: the layers' blobs are shared with IMAGE, and copied only where that is not possible. The
    result is what 'lazyfs convert --prefetch LIST' would have made. Of an index all lazy images get the hot part, or
    with --platform that one alone; the others stay as they are. DST names the new image only once everything is there.
    """
    if (list_name is None) is not no_prefetch:
        raise UsageError("say either --prefetch LIST or --no-prefetch")
    gc.set_threshold(100_000, 50, 50)   # as for convert
    wanted = None if list_name is None else _load(list_name, registry, platform)
    started_s = time.monotonic()
    with make_progress(quiet=quiet) as progress:
        report, target = run_optimize(image, destination, wanted, platform, registry, progress=progress)
    seconds = time.monotonic() - started_s
    if as_json:
        print_json(report_json(report, seconds))
    elif not quiet:
        print_report(report, target, seconds)


def _load(name: str, registry: RegistryOptions, platform: str | None) -> PrefetchList:
    from lazyfs.cli.profile_inputs import Images, Inputs  # noqa: PLC0415

    return Inputs(Images(registry, platform)).load_list(name)


def run_optimize(
    image: str, destination: str | None, wanted: PrefetchList | None, platform: str | None, registry: RegistryOptions,
    *, progress: Progress,
) -> tuple[OptimizeReport, str]:
    """The work, and the name of where the new image is. `destination` None: under its own name."""
    from converter.optimize import OptimizeOptions, optimize  # noqa: PLC0415
    from lazyfs.registry import open_destination, open_source, own_name, parse_reference  # noqa: PLC0415

    target = own_name(image) if destination is None else destination
    origin = parse_reference(image)
    replaces = origin.digest is None and (destination is None or parse_reference(destination) == origin)
    options = OptimizeOptions(wanted, platform, origin.identity, replaces, processors())
    with contextlib.closing(open_source(image, registry)) as source, \
            contextlib.closing(open_destination(target, registry)) as place:
        return optimize(source, place, options, _CopyEvents(progress)), target


class _CopyEvents:
    """Turns what the optimizer tells into progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def copy_started(self, digest: Digest, size: int) -> None:
        self._progress.start(digest.text, f"blob {digest.short}", size)

    def copied(self, digest: Digest, size_bytes: int) -> None:
        self._progress.advance(digest.text, size_bytes)

    def copy_done(self, digest: Digest, size: int) -> None:
        self._progress.finish(digest.text, f"blob {digest.short} copied: {format_bytes(size)}")


def print_report(report: OptimizeReport, target: str, seconds: float) -> None:
    """For people."""
    for image in report.images:
        if image.coverage is not None:
            for line in image.coverage.missing[:_LINES_SHOWN]:
                note(f"warning: {image.platform}: the list names {line!r}, which the image does not have")
            if len(image.coverage.missing) > _LINES_SHOWN:
                note(f"warning: and {len(image.coverage.missing) - _LINES_SHOWN} lines more ('lazyfs profile check')")
        print(f"{image.platform}: {_hot_text(image)}")
    copied = f"{format_bytes(report.copied_bytes)} copied, " if report.copied_bytes else ""
    print(f"{target}: {report.digest} in {seconds:.1f} s ({copied}layers unchanged)")


def _hot_text(image: OptimizedImage) -> str:
    if image.hot is None or image.coverage is None:
        return "no hot part"
    hot = image.hot
    return (f"hot {format_bytes(hot.size)} ({format_bytes(hot.device_size)} uncompressed in {hot.extent_count} pieces, "
            f"{hot.share * 100:.1f} % of the stored data); {image.coverage.share:.3f} of the list is in the image")


def report_json(report: OptimizeReport, seconds: float) -> dict[str, Any]:
    """A contract: members are only added."""
    return {
        "sourceDigest": report.source_digest.text,
        "digest": report.digest.text,
        "seconds": round(seconds, 3),
        "copiedBytes": report.copied_bytes,
        "images": [_image_json(image) for image in report.images],
    }


def _image_json(image: OptimizedImage) -> dict[str, Any]:
    hot, coverage = image.hot, image.coverage
    return {
        "platform": image.platform,
        "sourceDigest": image.source_digest.text,
        "digest": image.digest.text,
        "layerBytes": image.layer_bytes,
        "bootstrapBytes": image.bootstrap_size,
        "hot": None if hot is None else hot.as_json(),
        "coverage": None if coverage is None else coverage.as_json(),
    }
