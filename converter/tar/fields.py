"""
Numbers and strings as tar headers and PAX records spell them.

Pure functions of bytes; called by the other modules of converter.tar. Each raises FormatError, without the entry's
name (the reader adds it). Sources: POSIX.1-2017 pax, "ustar Interchange Format" and "pax Extended Header Keyword
Precedence"; GNU tar manual, "Extensions to the traditional tar format" (base-256).
"""

from __future__ import annotations

import re
from functools import lru_cache

from lazyfs.errors import FormatError

S64_MAX = (1 << 63) - 1
_OCTAL = re.compile(rb"[ \0]*([0-7]*)[ \0]*\Z")
_DECIMAL = re.compile(rb"[0-9]{1,20}\Z")
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?\Z")
_CHECKSUM = slice(148, 156)


@lru_cache(maxsize=8192)  # modes, owners and times of a layer repeat: a hit costs a fifth of the work
def number(raw: bytes) -> int:
    """
    A numeric header field: octal digits among spaces and NULs (none at all is 0), or GNU base-256.

    Base-256 has the top bit of the first byte set and is a two's complement number in the bits that are left.
    """
    if raw[0] & 0x80:
        bits = len(raw) * 8 - 1
        value = int.from_bytes(raw, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if raw[0] & 0x40 else value
    match = _OCTAL.match(raw)
    if match is None:
        raise FormatError(f"a numeric field holds {raw!r}, expected octal digits")
    return int(match[1] or b"0", 8)


def decimal(key: bytes, raw: bytes) -> int:
    """A PAX number: decimal digits only, no sign."""
    if not _DECIMAL.match(raw):
        raise FormatError(f"PAX record {key[:60]!r} holds {raw[:40]!r}, expected a decimal number")
    return int(raw)


@lru_cache(maxsize=8192)
def pax_time(raw: bytes) -> tuple[int, int]:
    """
    A PAX time as (seconds, nanoseconds 0 .. 999,999,999), seconds rounded down.

    Digits beyond the ninth are cut off, as Go's archive/tar does it.
    """
    match = _TIME.match(raw)
    if match is None:
        raise FormatError(f"PAX record b'mtime' holds {raw[:40]!r}, expected seconds as a decimal number")
    seconds, ns = int(match[2]), int((match[3] or b"")[:9].ljust(9, b"0"))
    if match[1]:
        seconds, ns = (-seconds - 1, 1_000_000_000 - ns) if ns else (-seconds, 0)
    return seconds, ns


def text(raw: bytes) -> bytes:
    """A string field: up to its first NUL, or the whole of it."""
    end = raw.find(0)
    return raw if end < 0 else raw[:end]


def bounded(what: str, value: int, high: int, low: int = 0) -> int:
    """`value`, if it is in low .. high."""
    if not low <= value <= high:
        raise FormatError(f"{what} is {value}, expected {low} to {high}")
    return value


def check_checksum(block: bytes) -> None:
    """Compare a header block's sum, of its bytes as unsigned or (as old tars on some machines) signed numbers."""
    stored = number(block[_CHECKSUM])
    field = block[_CHECKSUM]
    # Most of a header is NUL: dropping those first halves the time.
    unsigned = sum(block.translate(None, b"\0")) - sum(field) + 8 * 0x20
    if stored == unsigned:
        return
    high = sum(byte >> 7 for byte in block) - sum(byte >> 7 for byte in field)
    if stored != unsigned - 256 * high:
        raise FormatError(f"header checksum is {unsigned}, the header says {stored}")
