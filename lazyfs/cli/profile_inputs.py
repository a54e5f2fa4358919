"""
What the commands of `lazyfs profile` read: lists, recordings, and the lazy images whose files they are about.

Layer: cli. Who calls: lazyfs.cli.profile_{show,merge,diff,check}, which are imported only when they are used.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from lazyfs.cli.output import note
from lazyfs.errors import FormatError, UsageError
from lazyfs.image.prefetch import LIST_BYTES_MAX, PrefetchList, parse_prefetch
from lazyfs.profile.coverage import cover
from lazyfs.profile.files import ImageFiles, profile_of_recording
from lazyfs.profile.parts import profile_of
from lazyfs.profile.recording import Recording, from_json, looks_like_recording

if TYPE_CHECKING:
    from lazyfs.profile.parts import Profile
    from lazyfs.registry import RegistryOptions

image_option = click.option("--image", metavar="IMAGE", help="The lazy image that LIST is about: names its files, "
                            "tells sizes and layers.  [default: for a recording, the image it names]")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
_HINT = "LIST is a prefetch list, as 'lazyfs profile merge' writes it, or a recording"


class Loaded(NamedTuple):
    """A profile; with `files`, its patterns are paths of that image."""

    profile: Profile
    files: ImageFiles | None


class Images:
    """Lazy images by reference, each read once: manifest and bootstrap, never the blobs."""

    def __init__(self, registry: RegistryOptions, platform: str | None) -> None:
        self._registry = registry
        self._platform = platform
        self._files: dict[str, ImageFiles] = {}

    def files(self, reference: str) -> ImageFiles:
        """Raises FormatError: not a lazy image, or malformed; SourceError: it cannot be read."""
        from lazyfs.registry import open_source  # noqa: PLC0415  (a list alone needs no registry)
        from lazyfs.registry.lazy import load_lazy_image  # noqa: PLC0415
        from lazyfs.registry.select import select_image  # noqa: PLC0415

        if reference not in self._files:
            with contextlib.closing(open_source(reference, self._registry)) as source:
                image = load_lazy_image(source, select_image(source, self._platform))
            devices = image.bootstrap.devices
            self._files[reference] = ImageFiles(
                image.tree, [device.table for device in devices], [device.digest.text for device in devices])
        return self._files[reference]


class Inputs:
    """Reads what the words LIST of one command name."""

    def __init__(self, images: Images) -> None:
        self._images = images
        self._stdin_read = False

    def load(self, name: str, image: str | None) -> Loaded:
        """
        A list or recording as a profile.

        Args:
            name: of the file, or "-".
            image: find a list's files there; of a recording: it was made there, whatever it says.

        Raises:
            UsageError: it cannot be read, or is a recording of another image.
            FormatError: it is malformed.

        """
        parsed = self._parse(name)
        if isinstance(parsed, Recording):
            return self._recorded(name, parsed, image)
        if image is None:
            return Loaded(profile_of(parsed), None)
        files = self._images.files(image)
        found = cover(parsed, files)
        if found.missing or found.cut:
            note(f"warning: {name}: {len(found.missing)} lines name no file of {image}, {len(found.cut)} reach beyond "
                 f"one ('lazyfs profile check' shows them)")
        return Loaded(found.profile, files)

    def load_list(self, name: str) -> PrefetchList:
        """A list as it stands; a recording as the list that it makes. Raises as `load`."""
        from lazyfs.profile.parts import list_of  # noqa: PLC0415

        parsed = self._parse(name)
        return list_of(self._recorded(name, parsed, None).profile) if isinstance(parsed, Recording) else parsed

    def _parse(self, name: str) -> PrefetchList | Recording:
        data = self._read(name)
        try:
            return from_json(data) if looks_like_recording(data) else parse_prefetch(data)
        except FormatError as error:
            raise type(error)(f"{name}: {error}", hint=error.hint or _HINT) from error

    def _recorded(self, name: str, recording: Recording, image: str | None) -> Loaded:
        reference = image or recording.image
        if not reference:
            raise UsageError(f"{name}: the recording names no image", hint="name it with --image IMAGE")
        if recording.truncated:
            note(f"warning: {name}: the recording was cut off: the start touched more than it could hold")
        files = self._images.files(reference)
        return Loaded(profile_of_recording(recording, files), files)

    def _read(self, name: str) -> bytes:
        if name == "-":
            if self._stdin_read:
                raise UsageError("standard input ('-') can be read once only", hint="name a file for the other LIST")
            self._stdin_read = True
            return sys.stdin.buffer.read(LIST_BYTES_MAX + 1)
        try:
            with Path(name).open("rb") as file:
                return file.read(LIST_BYTES_MAX + 1)
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}", hint="LIST is a file, or '-' for standard input") from error
