"""
`lazyfs check LAZY [SOURCE]`: arguments, progress, the first differences, and an exit code by their kind.

Layer: cli. The work is done by converter.compare; heavy imports happen inside the command.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

import click

from lazyfs.cli.options import JOBS_MAX, platform_option, processors, registry_options
from lazyfs.cli.output import Progress, format_bytes, make_progress, note, print_json

if TYPE_CHECKING:
    from converter.compare import CheckResult
    from lazyfs.image.descriptor import Document
    from lazyfs.registry import RegistryOptions
    from lazyfs.registry.place import ImageSource


class _Words(NamedTuple):
    """What was asked for."""

    jobs: int
    platform: str | None


_EXAMPLES = """
\b
Examples:
  lazyfs check registry.example/app:1-lazy
  lazyfs check registry.example/app:1-lazy registry.example/app:1
  lazyfs check --json oci:/srv/images:web docker-archive:web.tar

\b
Exit codes:
  0   nothing differs
  51  a stored chunk is missing or damaged    54  bytes of a file differ
  52  names or types differ                   55  the configuration differs
  53  metadata differs
"""


@click.command("check", epilog=_EXAMPLES)
@click.argument("lazy", metavar="LAZY")
@click.argument("source", metavar="[SOURCE]", required=False)
@click.option("--jobs", type=click.IntRange(1, JOBS_MAX), metavar="N", help="Threads that decode.  "
              "[default: processors]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but differences and errors (and JSON).")
@platform_option
@registry_options
def check_command(
    lazy: str, source: str | None, *, jobs: int | None, as_json: bool, quiet: bool, platform: str | None,
    registry: RegistryOptions,
) -> None:
    """
    Verify a lazy image, also against its source image.

    Reads every chunk of every blob of LAZY, decodes it and compares its digest, and compares the tree with what the
    blobs record. With SOURCE, reads its layers again and compares names, types, metadata, hard links, every byte of
    every file, and the configuration. Prints the first 20 differences, one a line. Of an index, one image is checked.
    """
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        image_source = open_source(lazy, registry)
        stack.callback(image_source.close)
        original = None
        if source is not None:
            original = open_source(source, registry)
            stack.callback(original.close)
        document = select_image(image_source, platform)
        with make_progress(quiet=quiet) as progress:
            words = _Words(jobs or processors(), platform)
            result = _check(image_source, document, original, words, progress)
    if as_json:
        _print_json(lazy, source, result)
    else:
        _print_lines(lazy, source, result, quiet=quiet)
    error = result.differences.error()
    if error is not None:
        raise error


def _check(
    image_source: ImageSource, document: Document, original: ImageSource | None, words: _Words, progress: Progress
) -> CheckResult:
    from converter.compare import CheckOptions, check_image  # noqa: PLC0415

    names = {"blobs": "stored chunks", "source": "source image"}

    def on_start(task: str, total_bytes: int) -> None:
        progress.start(task, names[task], total_bytes)

    def on_end(task: str) -> None:
        progress.finish(task, f"{names[task]}: read")

    options = CheckOptions(words.jobs, on_start, progress.advance, on_end)
    return check_image(image_source, document, options, original, words.platform)


def _print_lines(lazy: str, source: str | None, result: CheckResult, *, quiet: bool) -> None:
    for kind, text in result.differences.first():
        click.echo(f"{kind}: {text}")
    hidden = result.differences.total - len(result.differences.first())
    if hidden > 0:
        click.echo(f"... and {hidden} more")
    if not result.differences.total and not quiet:
        size = format_bytes(sum(blob.size for blob in result.image.bootstrap.blobs))
        compared = f", {result.file_count} files equal to {source}" if source is not None else ""
        note(f"{lazy}: {result.chunk_count} chunks ({size}), {result.entry_count} entries{compared}: no differences")


def _print_json(lazy: str, source: str | None, result: CheckResult) -> None:
    print_json(
        {
            "image": lazy,
            "source": source,
            "chunks": result.chunk_count,
            "entries": result.entry_count,
            "filesCompared": result.file_count,
            "counts": result.differences.counts,
            "differences": [{"kind": kind, "text": text} for kind, text in result.differences.first()],
        }
    )
