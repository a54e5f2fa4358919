"""
What a worker recorded of a start: which bytes of which layer device were first asked for when, and by which container.

As JSON, in one line, a touch as five integers (device, start, end, microseconds, container):

    {"lazyfsRecording":1,"image":"registry/app@sha256:...","tool":"lazyfs 0.1.0","devices":[["sha256:...",4096]],
     "containers":["web"],"touches":[[0,0,4096,12500,0]],"truncated":false}

Layer: lazyfs.profile, pure. Who calls: files.py, the commands of `lazyfs profile`. Recordings come from nodes: hostile
until from_json has checked them. Invariants of a checked one: ranges lie in their device, times ascend.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

import msgspec

from lazyfs import limits, shapes
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.digest import Digest

RECORDING_VERSION: Final = 1
TOUCH_COUNT_MAX: Final = 1 << 18      # a start of tensorflow has 12,000
RECORDING_BYTES_MAX: Final = 16 * limits.MIB     # as many touches, 60 characters each
CONTAINER_COUNT_MAX: Final = 4096
_TEXT_CHARS_MAX: Final = 1024         # an image's name, a container's
_TIME_US_MAX: Final = 10**15          # thirty years
_US_PER_MS: Final = 1000
_BEGINNING = re.compile(rb'\s*\{\s*"lazyfsRecording"')

_Int = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Touch(NamedTuple):
    """Bytes [start, end) of a layer device, first asked for `ms` after the recording began. Two indexes."""

    device: int
    start: int
    end: int
    ms: float
    container: int = 0


@dataclass(frozen=True, slots=True)
class Recording:
    """
    One recorded start.

    Attributes:
        image: its reference, with the digest.
        tool: what recorded it.
        devices: (device digest, size in bytes) of the layer devices.
        containers: their names.
        touches: in the order of first access; a byte may be in several.
        truncated: there was more than a recording may hold.

    """

    image: str
    tool: str
    devices: tuple[tuple[str, int], ...]
    containers: tuple[str, ...]
    touches: tuple[Touch, ...]
    truncated: bool = False


class _Version(msgspec.Struct):
    version: int = msgspec.field(name="lazyfsRecording")


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    version: int = msgspec.field(name="lazyfsRecording")
    image: str
    tool: str
    devices: list[tuple[str, _Int]]
    containers: list[str]
    touches: list[tuple[_Int, _Int, _Int, _Int, _Int]]
    truncated: bool


def looks_like_recording(data: bytes) -> bool:
    """Whether it is to be read as a recording; no prefetch list begins like this."""
    return _BEGINNING.match(data) is not None


def to_json(recording: Recording) -> bytes:
    """One line; times are rounded to microseconds."""
    touches = [(touch.device, touch.start, touch.end, round(touch.ms * _US_PER_MS), touch.container)
               for touch in recording.touches]
    return msgspec.json.encode(_Document(
        RECORDING_VERSION, recording.image, recording.tool, list(recording.devices), list(recording.containers),
        touches, recording.truncated)) + b"\n"


def from_json(data: bytes) -> Recording:
    """
    Read and check a recording.

    Raises:
        UnsupportedError: of another version.
        FormatError: malformed, out of bounds, or it contradicts itself.

    """
    if len(data) > RECORDING_BYTES_MAX:
        raise FormatError(f"recording of {len(data)} bytes, at most {RECORDING_BYTES_MAX} are allowed")
    if data.count(b"[") > TOUCH_COUNT_MAX + limits.DEVICE_COUNT_MAX + 3:      # before objects are made of them
        raise FormatError(f"recording of more than {TOUCH_COUNT_MAX} touches")
    try:
        version = shapes.from_json(data, _Version).version
        if version != RECORDING_VERSION:
            raise UnsupportedError(f"recording of version {version}: this lazyfs reads version {RECORDING_VERSION}")
        document = shapes.from_json(data, _Document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise FormatError(f"recording: {str(error)[:200]}") from error
    _check_names(document)
    return Recording(
        document.image, document.tool, tuple(document.devices), tuple(document.containers), _touches(document),
        document.truncated)


def _check_names(document: _Document) -> None:
    if len(document.devices) > limits.DEVICE_COUNT_MAX or len(document.containers) > CONTAINER_COUNT_MAX:
        raise FormatError(f"recording of {len(document.devices)} devices and {len(document.containers)} containers, "
                          f"at most {limits.DEVICE_COUNT_MAX} and {CONTAINER_COUNT_MAX} are allowed")
    for text in (document.image, document.tool, *document.containers):
        if len(text) > _TEXT_CHARS_MAX or not text.isprintable():
            raise FormatError(f"recording: {text[:100]!r} is no name of at most {_TEXT_CHARS_MAX} characters")
    for digest, size in document.devices:
        Digest(digest)
        if size > limits.DEVICE_BYTES_MAX:
            raise FormatError(f"recording: a device of {size} bytes, at most {limits.DEVICE_BYTES_MAX} are allowed")


def _touches(document: _Document) -> tuple[Touch, ...]:
    touches, before_us = [], 0
    for number, (device, start, end, time_us, container) in enumerate(document.touches):
        if device >= len(document.devices) or container >= len(document.containers):
            raise FormatError(f"recording, touch {number}: of device {device} and container {container}, which it "
                              "does not list")
        if not start < end <= document.devices[device][1]:
            raise FormatError(f"recording, touch {number}: bytes {start} to {end} are no range of the device")
        if not before_us <= time_us <= _TIME_US_MAX:
            raise FormatError(f"recording, touch {number}: its time {time_us} is before the last one's, or too large")
        touches.append(Touch(device, start, end, time_us / _US_PER_MS, container))
        before_us = time_us
    return tuple(touches)
