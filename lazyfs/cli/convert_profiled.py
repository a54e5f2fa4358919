"""
`lazyfs convert --profile-run`: convert, run what came of it, give it what its start read as its hot part.

Layer: cli; thin: converter.build, lazyfs.runner and converter.optimize do the work. The image that is run is put at
DST's place by its digest only, so that its layers are where they belong and can be reused, and DST names nothing but
the final image; for an archive, which is there whole or not at all, in a directory of its own that goes afterwards.
Who calls: cli.convert.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.cli.convert import ProgressEvents, convert_json, print_summary, run_convert
from lazyfs.cli.mount import absolute_image
from lazyfs.cli.optimize import print_report, report_json, run_optimize
from lazyfs.cli.output import format_bytes, make_progress, note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.cli.profile_run import check_output, make_order, record_list, run_json
from lazyfs.image.prefetch import format_prefetch
from lazyfs.profile.parts import list_of
from lazyfs.registry import FileReference, check_apart, parse_reference
from lazyfs.registry.reference import FileTransport
from lazyfs.registry.staging import Staging, default_parent
from lazyfs.runner.session import check_host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from converter.report import ConvertOptions
    from lazyfs.registry import RegistryOptions


def convert_profiled(
    source: str, destination: str, command: tuple[str, ...], options: ConvertOptions, registry: RegistryOptions, *,
    words: dict[str, Any], quiet: bool, as_json: bool,
) -> None:
    """
    All of it. `words`: the command's options.

    Raises:
        ProgramError, NotReadyError: the run failed; DST names then what it named before.
        LazyfsError: of all kinds, likewise.

    """
    check_host()
    check_apart(source, destination)
    if words["list_file"] is not None:
        check_output(words["list_file"])
    order = make_order("", command, registry, words, runs=words["runs"], platform=options.platform)
    started_s = time.monotonic()
    with _staged(destination) as staging:
        with make_progress(quiet=quiet) as progress:
            converted = run_convert(source, staging, replace(options, named=False), registry, ProgressEvents(progress))
        converted_s = time.monotonic() - started_s
        if not (quiet or as_json):
            print_summary(converted, staging, converted_s)
        cold = replace(parse_reference(staging), tag="", digest=converted.digest).text
        order = replace(order, image=absolute_image(cold, str(Path.cwd())))
        recorded, profile = record_list(order, cold, min_share=words["min_share"], quiet=quiet)
        wanted = list_of(profile)
        if words["list_file"] is not None:
            write_output(words["list_file"], format_prefetch(wanted))
        note(f"{len(profile.parts)} ranges of files, {format_bytes(profile.size_bytes)}")
        with make_progress(quiet=quiet) as progress:
            report, _ = run_optimize(cold, destination, wanted, None, registry, progress=progress)
    seconds = time.monotonic() - started_s
    if as_json:
        print_json({"digest": report.digest.text, "seconds": round(seconds, 3),
                    "convert": convert_json(converted, converted_s),
                    "profile": run_json(recorded, profile, words["list_file"]),
                    "optimize": report_json(report, seconds)})
    elif not quiet:
        print_report(report, destination, seconds)


@contextlib.contextmanager
def _staged(destination: str) -> Iterator[str]:
    """Where the image that is run goes."""
    reference = parse_reference(destination)
    if not isinstance(reference, FileReference) or reference.transport is not FileTransport.OCI_ARCHIVE:
        yield destination
        return
    with contextlib.closing(Staging(default_parent())) as staging:
        yield f"oci:{staging.path / 'image'}:cold"
