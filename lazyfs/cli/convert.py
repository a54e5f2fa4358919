"""
`lazyfs convert SRC DST`: arguments, progress and result. The work is done by converter.build.

Layer: cli. Heavy imports happen inside, after the words of the command were found right.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any

import click

from lazyfs import limits
from lazyfs.cli.convert_words import profile_options, wants_profile
from lazyfs.cli.options import JOBS_MAX, platform_option, processors, registry_options
from lazyfs.cli.output import Progress, format_bytes, make_progress, note, print_json
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from converter.report import ConvertOptions, ConvertReport, ImageReport, LayerReport
    from lazyfs.image.descriptor import Descriptor
    from lazyfs.registry import RegistryOptions

_UNITS = {"": 1, "k": limits.KIB, "m": limits.MIB}
_EXAMPLES = """
\b
Examples:
  lazyfs convert registry.example/python:3.12 registry.example/python:3.12-lazy
  lazyfs convert docker-archive:image.tar oci:/srv/images:web
  lazyfs convert --codec zstd --prefetch start.txt oci:in:ml oci:out:ml
  lazyfs convert --all-platforms registry.example/app:1 registry.example/app:1-lazy
  lazyfs convert --profile-run --until-port 80 registry.example/web:1 registry.example/web:1-lazy
"""


class ChunkSize(click.ParamType[int]):
    """Bytes, or with k or m in KiB or MiB; a power of two."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).strip().lower().removesuffix("ib").removesuffix("b")
        number, unit = (text[:-1], text[-1]) if text[-1:] in ("k", "m") else (text, "")
        if not (number.isascii() and number.isdigit() and len(number) <= 9):
            self.fail(f"{value!r} is not a size: expected for example 256k or 1m", param, ctx)
        size = int(number) * _UNITS[unit]
        low, high = limits.CHUNK_SIZE_MIN_BYTES, limits.CHUNK_SIZE_MAX_BYTES
        if not low <= size <= high or size & (size - 1):
            self.fail(f"{value!r}: expected a power of two from {low // 1024}k to {high // limits.MIB}m", param, ctx)
        return size


@click.command("convert", epilog=_EXAMPLES)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.argument("command", nargs=-1, metavar="[-- COMMAND...]")
@click.option("--codec", type=click.Choice(["lz4", "zstd", "none"]), default="zstd", show_default=True,
              help="How chunks are compressed: zstd is smallest; lz4, with zstd where it saves much, reads fastest.")
@click.option("--level", type=int, metavar="N", help="Of the codec: lz4 1-12, zstd 1-19.  [default: by codec]")
@click.option("--chunk-size", type=ChunkSize(), default=limits.CHUNK_SIZE_DEFAULT_BYTES, metavar="SIZE",
              help=f"From 64k to 1m.  [default: {limits.CHUNK_SIZE_DEFAULT_BYTES // limits.MIB}m]")
@click.option("--prefetch", type=click.File("rb"), metavar="LIST",
              help="Paths and globs, one a line, in the order in which a start needs them ('-': stdin).")
@click.option("--jobs", type=click.IntRange(1, JOBS_MAX), metavar="N",
              help="Threads that compress, layers read at a time.  [default: processors]")
@click.option("--all-platforms", is_flag=True, help="Convert all images of an index; DST becomes an index.")
@click.option("--no-reuse", is_flag=True, help="Convert every layer anew, even if DST's place has it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--quiet", "-q", is_flag=True, help="Say nothing but errors (and JSON).")
@profile_options
@platform_option
@registry_options
def convert_command(
    source: str, destination: str, command: tuple[str, ...], *, as_json: bool, quiet: bool, registry: RegistryOptions,
    **words: Any,
) -> None:
    """
    Make a lazy image out of the OCI or Docker image SRC, at DST.

    SRC: docker://HOST/REPO:TAG (also by @digest, also without docker://), oci:DIR:TAG, oci-archive:FILE,
    docker-archive:FILE. DST: the same, but for docker-archive. Layers that an earlier conversion put at the same
    place are reused. DST names the new image only once everything is there.

    With --profile-run the image is then run, as by 'lazyfs profile run', and what its start read becomes its hot part.
    """
    gc.set_threshold(100_000, 50, 50)   # millions of entries, hardly a cycle: looking for them took a tenth of the time
    options = _options(words)
    if wants_profile(words, command):
        from lazyfs.cli.convert_profiled import convert_profiled  # noqa: PLC0415

        convert_profiled(source, destination, command, options, registry, words=words, quiet=quiet, as_json=as_json)
        return
    started_s = time.monotonic()
    with make_progress(quiet=quiet) as progress:
        report = run_convert(source, destination, options, registry, ProgressEvents(progress))
    seconds = time.monotonic() - started_s
    if as_json:
        print_json(convert_json(report, seconds))
    elif not quiet:
        print_summary(report, destination, seconds)


def run_convert(
    source_text: str, destination_text: str, options: ConvertOptions, registry: RegistryOptions,
    events: ProgressEvents,
) -> ConvertReport:
    from converter.build import convert  # noqa: PLC0415
    from lazyfs.registry import check_apart, open_destination, open_source  # noqa: PLC0415

    check_apart(source_text, destination_text)
    source = open_source(source_text, registry)
    try:
        destination = open_destination(destination_text, registry)
        try:
            return convert(source, destination, options, events=events)
        finally:
            destination.close()
    finally:
        source.close()


def _options(words: dict[str, Any]) -> ConvertOptions:
    from converter.encode import Encoding  # noqa: PLC0415
    from converter.report import ConvertOptions  # noqa: PLC0415
    from lazyfs.image.codec import LEVEL_DEFAULTS, LEVEL_RANGES, Codec  # noqa: PLC0415
    from lazyfs.image.prefetch import LIST_BYTES_MAX, parse_prefetch  # noqa: PLC0415

    codec, level = Codec[words["codec"].upper()], words["level"]
    low, high = LEVEL_RANGES[codec]
    if level is None:
        level = LEVEL_DEFAULTS[codec]
    if not low <= level <= high:
        raise UsageError(f"--level {level}: codec {words['codec']} has levels {low} to {high}")
    if words["all_platforms"] and words["platform"]:
        raise UsageError("--platform and --all-platforms exclude each other", hint="leave one of them out")
    prefetch = None
    if words["prefetch"] is not None:
        prefetch = parse_prefetch(words["prefetch"].read(LIST_BYTES_MAX + 1))
    return ConvertOptions(
        Encoding(codec, level, words["chunk_size"]), words["jobs"] or processors(), prefetch, words["platform"],
        words["all_platforms"], not words["no_reuse"],
    )


class ProgressEvents:
    """Turns what the converter tells into progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def layer_started(self, layer: Descriptor) -> None:
        self._progress.start(layer.digest.text, f"layer {layer.digest.short}", layer.size)

    def layer_read(self, layer: Descriptor, size_bytes: int) -> None:
        self._progress.advance(layer.digest.text, size_bytes)

    def layer_done(self, report: LayerReport) -> None:
        how = "reused" if report.reused else "converted"
        sizes = f"{format_bytes(report.source_size)} -> {format_bytes(report.blob_size)}"
        self._progress.finish(report.source_digest.text, f"layer {report.source_digest.short} {how}: {sizes}")
        for warning in report.warnings:
            self._progress.note(f"warning: {warning}")

    def note(self, text: str) -> None:
        self._progress.note(f"note: {text}")


def print_summary(report: ConvertReport, destination: str, seconds: float) -> None:
    for image in report.images:
        reused = sum(layer.reused for layer in image.layers)
        parts = [f"{len(image.layers)} layers" + (f" ({reused} reused)" if reused else "")]
        parts.append(f"{format_bytes(image.source_size)} -> {format_bytes(image.size)}")
        if image.hot is not None:
            parts.append(f"hot {format_bytes(image.hot.size)} ({image.hot.share * 100:.1f} %)")
            for line in image.hot.unmatched[:10]:
                note(f"warning: the prefetch list names {line!r}, which the image does not have")
        print(f"{image.platform}: {', '.join(parts)}")
    print(f"{destination}: {report.digest} in {seconds:.1f} s")


def convert_json(report: ConvertReport, seconds: float) -> dict[str, Any]:
    return {
        "sourceDigest": report.source_digest.text,
        "digest": report.digest.text,
        "seconds": round(seconds, 3),
        "sourceBytes": sum(image.source_size for image in report.images),
        "bytes": sum(image.size for image in report.images),
        "images": [_image_json(image) for image in report.images],
        "notes": list(report.notes),
    }


def _image_json(image: ImageReport) -> dict[str, Any]:
    hot = image.hot
    return {
        "platform": image.platform,
        "sourceDigest": image.source_digest.text,
        "digest": image.digest.text,
        "sourceBytes": image.source_size,
        "bytes": image.size,
        "bootstrapBytes": image.bootstrap_size,
        "hot": None if hot is None else {**hot.as_json(), "unmatched": list(hot.unmatched)},
        "layers": [_layer_json(layer) for layer in image.layers],
    }


def _layer_json(layer: LayerReport) -> dict[str, Any]:
    return {
        "sourceDigest": layer.source_digest.text,
        "sourceBytes": layer.source_size,
        "digest": layer.blob_digest.text,
        "bytes": layer.blob_size,
        "deviceBytes": layer.device_size,
        "chunks": layer.chunk_count,
        "entries": layer.entry_count,
        "reused": layer.reused,
        "warnings": list(layer.warnings),
    }
