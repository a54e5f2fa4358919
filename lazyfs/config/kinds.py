"""
What a value of the configuration may be: from TOML, or as text from the environment.

Layer: config. Who calls: config.table names them, config.loading uses them. A kind says in one phrase what it expects
(for messages and for docs/configuration.md); `accept` raises ValueError for everything else, and nothing but that.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SIZE = r"(\d{1,19}(?:\.\d{1,6})?) ?([KMGTkmgt][Ii]?[Bb]|[Bb]?)"
_PERCENT = r"(\d{1,2}(?:\.\d{1,3})?) ?%"
_NAME = r"[A-Za-z0-9._-]{1,128}"
_HOST_NAME = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
_SIZE_BYTES_MAX = 2**63 - 1
_TEXT_CHARS_MAX = 4096           # PATH_MAX
_YES, _NO = frozenset({"true", "1", "yes", "on"}), frozenset({"false", "0", "no", "off"})


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, or a share of a file system. Exactly one of the two is not None."""

    bytes: int | None = None
    percent: float | None = None

    def of(self, total_bytes: int) -> int:
        """In bytes, where the whole has `total_bytes`."""
        if self.percent is not None:
            return int(total_bytes * self.percent / 100)
        assert self.bytes is not None
        return self.bytes

    def __str__(self) -> str:
        return f"{self.percent:g}%" if self.percent is not None else str(self.bytes)


class Kind:
    """Any text of one line; the base of the others."""

    @property
    def expected(self) -> str:
        return "text"

    def accept(self, value: object) -> object:
        """The value as the program uses it. Raises ValueError: not of this kind."""
        if not isinstance(value, str) or len(value) > _TEXT_CHARS_MAX or not (value.isprintable() or not value):
            raise ValueError(value)
        return value

    def from_text(self, text: str) -> object:
        """The same, from the environment."""
        return self.accept(text)


class AbsolutePath(Kind):
    """A path from the root; `optional`: or nothing."""

    def __init__(self, *, optional: bool = False) -> None:
        self.optional = optional

    @property
    def expected(self) -> str:
        return "an absolute path" + (', or ""' if self.optional else "")

    def accept(self, value: object) -> object:
        text = Kind.accept(self, value)
        assert isinstance(text, str)
        if text.startswith("/") or (self.optional and not text):
            return text
        raise ValueError(value)


class Paths(Kind):
    """Paths from the root: a list, in the environment with a colon between them. The value is a tuple."""

    _COUNT_MAX = 64

    @property
    def expected(self) -> str:
        return "a list of absolute paths"

    def accept(self, value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) > self._COUNT_MAX:
            raise ValueError(value)
        return tuple(AbsolutePath().accept(one) for one in value)

    def from_text(self, text: str) -> object:
        return self.accept([one for one in text.split(":") if one])


class Choice(Kind):
    """One of some words."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.words = words

    @property
    def expected(self) -> str:
        return "one of " + ", ".join(self.words)

    def accept(self, value: object) -> object:
        if value not in self.words:
            raise ValueError(value)
        return value


class Flag(Kind):
    """true or false."""

    @property
    def expected(self) -> str:
        return "true or false"

    def accept(self, value: object) -> object:
        if not isinstance(value, bool):
            raise ValueError(value)   # noqa: TRY004 - one exception for every caller
        return value

    def from_text(self, text: str) -> object:
        if text.lower() in _YES | _NO:
            return text.lower() in _YES
        raise ValueError(text)


class Number(Kind):
    """A number in a range; `whole`: an integer."""

    def __init__(self, low: float, high: float, *, whole: bool = False) -> None:
        self.low, self.high, self.whole = low, high, whole

    @property
    def expected(self) -> str:
        return f"{'a whole number' if self.whole else 'a number'} from {self.low:g} to {self.high:g}"

    def accept(self, value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            raise ValueError(value)   # noqa: TRY004 - one exception for every caller
        assert isinstance(value, int | float)
        if not math.isfinite(value) or not self.low <= value <= self.high:
            raise ValueError(value)
        return value if self.whole else float(value)

    def from_text(self, text: str) -> object:
        if len(text) > 40:
            raise ValueError(text)
        return self.accept(int(text) if self.whole else float(text))


class Size(Kind):
    """Bytes, plainly or with a unit; `share`: or a percentage, and then an Amount."""

    def __init__(self, *, share: bool = False) -> None:
        self.share = share

    @property
    def expected(self) -> str:
        return 'bytes, or a size like "20GiB"' + (', or a share like "5%"' if self.share else "")

    def accept(self, value: object) -> object:
        if isinstance(value, str):
            return self._from_words(value)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _SIZE_BYTES_MAX:
            raise ValueError(value)
        return Amount(bytes=value) if self.share else value

    def _from_words(self, text: str) -> object:
        share = re.fullmatch(_PERCENT, text) if self.share else None
        if share is not None:
            return Amount(percent=float(share[1]))
        found = re.fullmatch(_SIZE, text)
        if found is None:
            raise ValueError(text)
        size = round(float(found[1]) * _UNITS[found[2].upper()]) if "." in found[1] else (
            int(found[1]) * _UNITS[found[2].upper()])
        return self.accept(size)


class Address(Kind):
    """Where to listen: host:port, :port or port (loopback), or nothing. The value is host:port, or empty."""

    @property
    def expected(self) -> str:
        return '"host:port", "port" (on loopback), or ""'

    def accept(self, value: object) -> object:
        text = Kind.accept(self, value)
        assert isinstance(text, str)
        if not text:
            return text
        host, _, port = text.rpartition(":")
        host = host or "127.0.0.1"
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 <= int(port) <= 65535:
            raise ValueError(value)
        if host.startswith("["):
            if not host.endswith("]"):
                raise ValueError(value)
            from ipaddress import IPv6Address  # noqa: PLC0415 - rare, and slow to import

            IPv6Address(host[1:-1])
        elif re.fullmatch(_HOST_NAME, host) is None:
            raise ValueError(value)
        return f"{host}:{port}"


class Shaped(Kind):
    """Text of one shape; `optional`: or nothing."""

    def __init__(self, shape: str, named: str, *, optional: bool = False) -> None:
        """`shape`: a regular expression for all of it; `named`: what is expected, in words."""
        self.shape, self.named, self.optional = shape, named, optional

    @property
    def expected(self) -> str:
        return self.named + (', or ""' if self.optional else "")

    def accept(self, value: object) -> object:
        text = Kind.accept(self, value)
        assert isinstance(text, str)
        if re.fullmatch(self.shape, text) is None and not (self.optional and not text):
            raise ValueError(value)
        return text


class Url(Shaped):
    """An http or https URL without user name, query and fragment; or nothing, unless `required`."""

    def __init__(self, *, required: bool = False) -> None:
        super().__init__(r"https?://[^/?#@\s]+(/[^?#@\s]*)?", '"https://host[:port][/path]"', optional=not required)


class Pattern(Kind):
    """A regular expression, as Python has them."""

    @property
    def expected(self) -> str:
        return "a regular expression"

    def accept(self, value: object) -> object:
        text = Kind.accept(self, value)
        assert isinstance(text, str)
        try:
            re.compile(text)
        except (re.error, RecursionError, OverflowError):
            raise ValueError(value) from None
        return text


class Place(Kind):
    """Where another process listens: host:port; `optional`: or nothing."""

    def __init__(self, *, optional: bool = False) -> None:
        self.optional = optional

    @property
    def expected(self) -> str:
        return '"host:port"' + (', or ""' if self.optional else "")

    def accept(self, value: object) -> object:
        text = Kind.accept(self, value)
        assert isinstance(text, str)
        if not text and self.optional:
            return text
        if text.startswith(":") or ":" not in text or text.endswith(":0"):
            raise ValueError(value)
        return Address().accept(text)


class Name(Shaped):
    """A short name of letters, digits, dots, dashes and underscores; `optional`: or nothing."""

    def __init__(self, *, optional: bool = False) -> None:
        super().__init__(_NAME, "a name of A-Z a-z 0-9 . _ -, at most 128", optional=optional)


class List(Kind):
    """Values of one kind: a list, in the environment with commas between them. The value is a tuple."""

    def __init__(self, kind: Kind, words: str, count_max: int) -> None:
        """`words`: what they are, in the plural."""
        self.kind, self.words, self.count_max = kind, words, count_max

    @property
    def expected(self) -> str:
        return f"a list of {self.words}, at most {self.count_max}"

    def accept(self, value: object) -> object:
        if not isinstance(value, list | tuple) or len(value) > self.count_max:
            raise ValueError(value)
        return tuple(self.kind.accept(one) for one in value)

    def from_text(self, text: str) -> object:
        return self.accept([one.strip() for one in text.split(",") if one.strip()])


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 address without its brackets) and port of an accepted Address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
