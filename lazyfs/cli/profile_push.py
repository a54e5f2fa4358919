"""
`lazyfs profile push LIST IMAGE` and `lazyfs profile pull IMAGE`: the list as an artifact beside the image it is for.

Layer: cli; thin: the work is in lazyfs.registry.referrers, imported inside the commands.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from lazyfs import limits
from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import note, print_json
from lazyfs.cli.outputfile import write_output
from lazyfs.cli.profile_inputs import Images, Inputs, json_option
from lazyfs.errors import NotFoundError, UsageError

if TYPE_CHECKING:
    from lazyfs.image.descriptor import Document
    from lazyfs.registry import RegistryOptions

_PUSH_EPILOG = """\b
Examples:
  lazyfs profile push start.txt registry.example/app:1-lazy
  lazyfs profile push arm.txt registry.example/app:1-lazy --platform linux/arm64
"""
_PULL_EPILOG = """\b
Examples:
  lazyfs profile pull registry.example/app:1-lazy -o start.txt
  lazyfs profile pull oci:/srv/images:web | lazyfs profile show -

\b
Exit codes:
  21  there is no list beside IMAGE
"""


@click.command("push", epilog=_PUSH_EPILOG)
@click.argument("list_name", metavar="LIST")
@click.argument("image", metavar="IMAGE")
@json_option
@platform_option
@registry_options
def push_command(
    list_name: str, image: str, *, as_json: bool, platform: str | None, registry: RegistryOptions
) -> None:
    """
    Put the prefetch list LIST beside the lazy image IMAGE: as an artifact that refers to IMAGE's manifest.

    The image stays as it is. The newest list counts; where the registry has no referrers API, and in an image layout,
    it takes the place of the one before. Comments in LIST other than its header are not kept.
    """
    from lazyfs.image.artifact import TIME_FORMAT, referrers_tag  # noqa: PLC0415
    from lazyfs.image.prefetch import format_prefetch  # noqa: PLC0415
    from lazyfs.registry import FileReference, open_destination, parse_reference  # noqa: PLC0415
    from lazyfs.registry.reference import FileTransport  # noqa: PLC0415
    from lazyfs.registry.referrers import put_list  # noqa: PLC0415

    reference = parse_reference(image)
    if isinstance(reference, FileReference) and reference.transport is not FileTransport.OCI:
        raise UsageError(f"{image}: nothing can be put beside an image in an archive",
                         hint="push it to a registry or an oci: directory first")
    text = format_prefetch(Inputs(Images(registry, platform)).load_list(list_name)).encode()
    subject = _manifest(image, platform, registry)
    created = dt.datetime.now(dt.UTC).strftime(TIME_FORMAT)
    beside = replace(reference, tag=referrers_tag(subject.digest), digest=None)
    with contextlib.closing(open_destination(beside.text, registry)) as place:
        done = put_list(place, subject, text, created, time.monotonic() + limits.REQUEST_DEADLINE_S)
    if as_json:
        print_json({"image": image, "subject": subject.digest.text, "digest": done.digest.text, "isNew": done.is_new})
    else:
        click.echo(f"{reference.identity}@{done.digest}: the list for {subject.digest.short}"
                   f"{'' if done.is_new else ' (it was there already)'}")


@click.command("pull", epilog=_PULL_EPILOG)
@click.argument("image", metavar="IMAGE")
@click.option("--output", "-o", metavar="FILE", default="-", help="Where the list goes.  [default: standard output]")
@platform_option
@registry_options
def pull_command(image: str, *, output: str, platform: str | None, registry: RegistryOptions) -> None:
    """Write the prefetch list that is beside the lazy image IMAGE, the newest if there are several."""
    from lazyfs.image.prefetch import format_prefetch  # noqa: PLC0415
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.referrers import find_list  # noqa: PLC0415

    subject = _manifest(image, platform, registry)
    with contextlib.closing(open_source(image, registry)) as source:
        found = find_list(source, subject.digest, time.monotonic() + limits.REQUEST_DEADLINE_S)
    if found is None:
        raise NotFoundError(f"{image}: there is no prefetch list beside it",
                            hint="'lazyfs profile run' records one, 'lazyfs profile push' puts it there")
    write_output(output, format_prefetch(found))
    note(f"{len(found.entries)} lines, for {subject.digest}")


def _manifest(image: str, platform: str | None, registry: RegistryOptions) -> Document:
    """The lazy image's manifest. Raises FormatError: it is none."""
    from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest  # noqa: PLC0415
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    with contextlib.closing(open_source(image, registry)) as source:
        document = select_image(source, platform)
        parse_lazy_manifest(parse_manifest(document.data, document.media_type), source.name)
        return document
