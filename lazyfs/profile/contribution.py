"""
What a node contributes from production: a recording without anything that says whose it is. And which image it is of.

Layer: lazyfs.profile, pure. Who calls: node.uploads makes them, node.collector checks them, cli.profile_collected reads
them. Contributions come from whoever has the token: hostile until read_contribution has checked them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from lazyfs.errors import FormatError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.profile.files import profile_of_recording
from lazyfs.profile.recording import Recording, Touch, from_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lazyfs.profile.files import ImageFiles
    from lazyfs.profile.parts import Profile

CONTRIBUTION_BYTES_MAX: Final = 4 << 20      # 65,536 touches of 50 characters, as many as a worker notes
CONTRIBUTION_TOUCH_COUNT_MAX: Final = 1 << 16
_TIME_MS_MAX: Final = 24 * 3600 * 1000.0     # no start takes a day
_US_PER_MS: Final = 1000


def image_key(digests: Iterable[str]) -> str:
    """Which image: 64 hex digits over its device digests, in order, each once. Its hot part does not count."""
    return Digest.of("\n".join(dict.fromkeys(digests)).encode()).hex


def make_contribution(tool: str, devices: Sequence[tuple[str, int]], rows: Iterable[tuple[int, ...]],
                      after_us: int) -> Recording | None:
    """
    What a recorder holds, made anonymous: no image's name, no container; times from the first touch on.

    Args:
        tool: what recorded it.
        devices: (digest, size in bytes), as touches number them.
        rows: device, start, end, microseconds, caller; as node.recorder gives them.
        after_us: what was first read later than this after the first touch is left out.

    Returns: None: nothing was read.

    """
    sizes = dict(devices)   # one layer may be there twice
    numbers = [list(sizes).index(digest) for digest, _ in devices]
    touches: list[Touch] = []
    first_us: int | None = None
    for device, start, end, time_us, _ in rows:
        first_us = time_us if first_us is None else first_us
        if time_us - first_us > after_us:
            break
        touches.append(Touch(numbers[device], start, end, (time_us - first_us) / _US_PER_MS))
    return Recording("", tool, tuple(sizes.items()), ("",), tuple(touches)) if touches else None


def read_contribution(data: bytes) -> Recording:
    """
    Read and check one.

    Raises:
        FormatError: malformed, out of bounds, or it says more than it should.

    """
    if len(data) > CONTRIBUTION_BYTES_MAX:
        raise FormatError(f"contribution of {len(data)} bytes, at most {CONTRIBUTION_BYTES_MAX} are allowed")
    recording = from_json(data)
    if recording.image or recording.containers != ("",):
        raise FormatError("contribution that names an image or containers: it must be anonymous")
    if not recording.touches or len(recording.touches) > CONTRIBUTION_TOUCH_COUNT_MAX:
        raise FormatError(f"contribution of {len(recording.touches)} touches, 1 to {CONTRIBUTION_TOUCH_COUNT_MAX} are "
                          "allowed")
    if recording.touches[-1].ms > _TIME_MS_MAX:
        raise FormatError(f"contribution of {recording.touches[-1].ms / 1000:.0f} s, at most a day is allowed")
    if len({digest for digest, _ in recording.devices}) != len(recording.devices):
        raise FormatError("contribution that lists a device twice")
    return recording


def usable(contributions: Iterable[Recording], files: ImageFiles) -> list[Profile]:
    """The profiles of those that fit an image: its devices with their sizes. What does not fit was made up."""
    sizes = {digest: table.device_size for digest, table in zip(files.digests, files.tables, strict=True)}
    found = []
    for recording in contributions:
        if all(sizes.get(digest) == size for digest, size in recording.devices):
            try:
                profile = profile_of_recording(recording, files)
            except UsageError:
                continue
            if profile.parts:
                found.append(profile)
    return found
