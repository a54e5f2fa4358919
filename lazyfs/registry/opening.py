"""
From a reference to its source or destination.

Layer: registry. Who calls: converter, node, cli (through `lazyfs.registry`). Transports are imported when used: an
oci: directory needs no HTTP library.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lazyfs.errors import UsageError
from lazyfs.registry.reference import FileReference, FileTransport, RegistryReference, parse_reference

if TYPE_CHECKING:
    from lazyfs.registry.options import RegistryOptions
    from lazyfs.registry.place import ImageDestination, ImageSource


def open_source(text: str, options: RegistryOptions) -> ImageSource:
    """
    The image that `text` names, for reading. Registries are not asked before the first request.

    Raises:
        UsageError: `text` is no reference. NotFoundError, FormatError: there is no such (readable) file.

    """
    reference = parse_reference(text)
    if isinstance(reference, RegistryReference):
        from lazyfs.registry.client import RegistryClient  # noqa: PLC0415
        from lazyfs.registry.remote import RegistrySource  # noqa: PLC0415

        return RegistrySource(RegistryClient(reference.host, reference.repository, options), reference)
    return _open_file_source(reference)


def _open_file_source(reference: FileReference) -> ImageSource:
    from lazyfs.registry.dockerarchive import DockerArchiveSource  # noqa: PLC0415
    from lazyfs.registry.files import DirectoryFiles, TarFiles  # noqa: PLC0415
    from lazyfs.registry.layout import LayoutSource  # noqa: PLC0415

    if reference.transport is FileTransport.OCI:
        return LayoutSource(DirectoryFiles(reference.path), reference)
    if reference.transport is FileTransport.OCI_ARCHIVE:
        return LayoutSource(TarFiles(reference.path), reference)
    return DockerArchiveSource(reference)


def check_apart(source_text: str, destination_text: str) -> None:
    """
    Whether writing the destination leaves the source where it is.

    Raises:
        UsageError: one of them is no reference, or the destination would take the source's name or file.

    """
    source, destination = parse_reference(source_text), parse_reference(destination_text)
    if isinstance(source, RegistryReference) or isinstance(destination, RegistryReference):
        is_same = source.digest is None and source == destination
    elif os.path.realpath(source.path) != os.path.realpath(destination.path):
        is_same = False
    else:   # an archive is replaced whole, a directory's other tags stay
        is_same = destination.transport is not FileTransport.OCI or (
            source.digest is None and source.tag == destination.tag)
    if is_same:
        raise UsageError(f"{destination.text} is the source itself: it would be replaced",
                         hint="name the lazy image another way, for example with -lazy at the tag's end")


def own_name(text: str) -> str:
    """
    The destination by which an image is replaced under the name that it was read by.

    Raises:
        UsageError: it has none, or other images would be lost.

    """
    reference = parse_reference(text)
    if reference.digest is not None:
        raise UsageError(f"{reference.text} is named by its digest: what replaces it has another one",
                         hint="say where the new image shall go: DST")
    if isinstance(reference, RegistryReference) or reference.transport is FileTransport.DOCKER_ARCHIVE:
        return text
    from lazyfs.image.artifact import is_referrers_tag  # noqa: PLC0415
    from lazyfs.registry.files import DirectoryFiles, TarFiles  # noqa: PLC0415
    from lazyfs.registry.layout import read_index  # noqa: PLC0415

    is_archive = reference.transport is FileTransport.OCI_ARCHIVE
    files = TarFiles(reference.path) if is_archive else DirectoryFiles(reference.path)
    try:
        tags = [entry.tag for entry in read_index(files) if is_archive or not is_referrers_tag(entry.tag)]
    finally:
        files.close()
    if is_archive and len(tags) > 1:
        raise UsageError(f"{reference.text}: the archive holds other images as well, which would be lost",
                         hint="say where the new image shall go: DST")
    return replace(reference, tag=reference.tag or (tags[0] if len(tags) == 1 else "")).text


def open_destination(text: str, options: RegistryOptions) -> ImageDestination:
    """
    Where `text` says that an image shall go. Nothing is sent before the first put.

    Raises:
        UsageError: `text` is no reference, or none that can be written. TargetError: the directory cannot be used.

    """
    reference = parse_reference(text)
    if reference.digest is not None:
        raise UsageError("a destination is named by a tag; its digest comes out of what is written",
                         hint="leave out @sha256:...")
    if isinstance(reference, RegistryReference):
        from lazyfs.registry.client import RegistryClient  # noqa: PLC0415
        from lazyfs.registry.push import RegistryDestination  # noqa: PLC0415

        client = RegistryClient(reference.host, reference.repository, options, through_mirrors=False)
        return RegistryDestination(client, reference)
    if reference.transport is FileTransport.OCI:
        from lazyfs.registry.layoutwrite import LayoutDestination  # noqa: PLC0415

        return LayoutDestination(reference)
    if reference.transport is FileTransport.OCI_ARCHIVE:
        from lazyfs.registry.archive import ArchiveDestination  # noqa: PLC0415

        return ArchiveDestination(reference)
    raise UsageError("docker-archive: can be read, not written", hint="write oci-archive:FILE or oci:DIR:TAG")
