"""
JSON, msgpack and plain objects of stated shapes, from any thread.

Layer: with limits and errors. Who calls: whoever reads what came from outside. Why not msgspec at once: it makes what
it knows of a type when that is first used, and two threads that do so at the same time end the process (0.22: a worker
died of it, signal 11). So what it knows of a type is made here, under one lock, and kept with the decoder.

State: _json and _msgpack, a decoder a type; types are made at import, so there are as many as the program has.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

_T = TypeVar("_T")
_lock = threading.Lock()
_json: dict[Any, msgspec.json.Decoder[Any]] = {}
_msgpack: dict[Any, msgspec.msgpack.Decoder[Any]] = {}


def json_decoder(shape: type[_T]) -> msgspec.json.Decoder[_T]:
    """The one decoder of a shape; its decode() is for any thread."""
    decoder = _json.get(shape)
    if decoder is None:
        with _lock:
            decoder = _json.setdefault(shape, msgspec.json.Decoder(shape))
    return decoder


def msgpack_decoder(shape: type[_T]) -> msgspec.msgpack.Decoder[_T]:
    """The same for msgpack."""
    decoder = _msgpack.get(shape)
    if decoder is None:
        with _lock:
            decoder = _msgpack.setdefault(shape, msgspec.msgpack.Decoder(shape))
    return decoder


def from_json(data: bytes | bytearray | memoryview | str, shape: type[_T]) -> _T:
    """Raises msgspec.MsgspecError, RecursionError, UnicodeDecodeError: the data has another shape."""
    return json_decoder(shape).decode(data)


def from_msgpack(data: bytes | bytearray | memoryview, shape: type[_T]) -> _T:
    """The same for msgpack."""
    return msgpack_decoder(shape).decode(data)


def from_plain(content: object, shape: type[_T]) -> _T:
    """Out of dicts and lists, as a YAML reader makes them. Raises msgspec.ValidationError."""
    json_decoder(shape)    # what msgspec.convert would make
    return msgspec.convert(content, type=shape)
