"""
containerd's filter language: which snapshots List answers.

    filter    = selector *("," selector)          all must match
    selector  = fieldpath [operator value]        without operator: the field is there
    fieldpath = field *("." field)
    field     = quoted | 1*[A-Za-z0-9_]
    operator  = "==" | "!=" | "~="                the last: a regular expression is found in it
    value     = quoted | 1*<no space, no comma>
    quoted    = a Go string between "..." or, for regular expressions only, /.../ or |...|

Several filters: any may match; no filter, or an empty one, matches all. A snapshot has kind, name, parent, labels.KEY.
Regular expressions are Python's with ASCII classes; one that does not compile matches nothing, as with containerd.
Layer: snapshotter, above model. Pure: no I/O, no state. The input is bytes from outside: length is bounded here.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

from snapshotter.failures import SnapshotInvalidError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from snapshotter.model import SnapshotInfo

    Match = Callable[[SnapshotInfo], bool]

FILTER_CHARS_MAX = 16 * 1024     # two labels of the largest size, quoted
FILTER_COUNT_MAX = 256
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"[=!~]+")
_ESCAPE = re.compile(r"\\(?:([abfnrtv\\])|([0-7]{3})|x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))",
                     re.DOTALL)
_NAMED = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11, "\\": 92}
_SEPARATORS_OF_PYTHON = "\x1c\x1d\x1e\x1f"   # str.isspace() knows these four, Go does not
_REPLACEMENT = 0xFFFD
_CHAR_MAX = 0x10FFFF


def parse_filters(filters: Iterable[str]) -> Match:
    """
    Make one test of several filters, any of which may match.

    Raises:
        SnapshotInvalidError: one of them does not parse; the message shows where.

    """
    texts = list(filters)
    if len(texts) > FILTER_COUNT_MAX:
        raise SnapshotInvalidError(f"{len(texts)} filters, at most {FILTER_COUNT_MAX} are taken")
    tests = [_Parser(text).filter() for text in texts]
    return (lambda info: any(test(info) for test in tests)) if tests else _always


def _always(_info: SnapshotInfo) -> bool:
    return True


def _field(info: SnapshotInfo, path: list[str]) -> str | None:
    """None: the snapshot has no such field."""
    match path[0]:
        case "kind":
            return info.kind.value
        case "name":
            return info.name
        case "parent":
            return info.parent
        case "labels":
            return info.labels.get(".".join(path[1:]))
    return None


class _Parser:
    """Reads one filter. State: `at`, how far it has read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def filter(self) -> Match:
        if len(self.text) > FILTER_CHARS_MAX:
            raise SnapshotInvalidError(f"a filter of {len(self.text)} characters, at most {FILTER_CHARS_MAX} are taken")
        if "\0" in self.text:
            self.at = self.text.index("\0")
            raise self.fault("a NUL")
        if not self.text:
            return _always
        tests = [self.selector()]
        while self.at < len(self.text):
            if self.peek() != ",":
                raise self.fault("expected ','")
            self.at += 1
            tests.append(self.selector())
        return lambda info: all(test(info) for test in tests)

    def selector(self) -> Match:
        path = [self.field()]
        while self.peek() == ".":
            self.at += 1
            path.append(self.field())
        if self.peek() in {"", ","}:
            return lambda info: _field(info, path) is not None
        operator = self.operator()
        value = self.value(regular=operator == "~=")
        if operator == "==":
            return lambda info: _field(info, path) == value
        if operator == "!=":
            return lambda info: (_field(info, path) or "") != value
        expression = _compile(value)
        return lambda info: expression is not None and expression.search(_field(info, path) or "") is not None

    def field(self) -> str:
        self.skip_spaces()
        if self.peek() in {'"', "/", "|"}:
            return self.quoted(regular=False)
        found = _FIELD.match(self.text, self.at)
        if not found:
            raise self.fault("expected a field's name")
        self.at = found.end()
        return found[0]

    def operator(self) -> str:
        self.skip_spaces()
        found = _OPERATOR.match(self.text, self.at)
        if not found or found[0] not in {"==", "!=", "~="}:
            raise self.fault("expected '==', '!=' or '~='")
        self.at = found.end()
        return found[0]

    def value(self, *, regular: bool) -> str:
        self.skip_spaces()
        if self.peek() in {'"', "/", "|"}:
            return self.quoted(regular=regular)
        if self.peek() in {"", ",", ".", "=", "!", "~"}:
            raise self.fault("expected a value; quote it if it begins like this")
        start = self.at
        self.at += 1
        while self.peek() and self.peek() != "," and not self.peek().isspace() and self.peek().isprintable():
            self.at += 1
        return self.text[start:self.at]

    def quoted(self, *, regular: bool) -> str:
        quote = self.peek()
        if quote != '"' and not regular:
            raise self.fault('only "..." quotes here')
        content = bytearray()
        self.at += 1
        while (char := self.peek()) != quote:
            if char in {"", "\n"}:
                raise self.fault("a quoted text does not end")
            if char == "\\":
                content += self.escape(quote)
            else:
                content += char.encode("utf-8", "surrogateescape")
                self.at += 1
        self.at += 1
        return content.decode("utf-8", "surrogateescape")

    def escape(self, quote: str) -> bytes:
        found = _ESCAPE.match(self.text, self.at)
        if not found:
            raise self.fault("a quoted text does not end")
        named, octal, byte, short, long, other = found.groups()
        if other is not None and other != quote:
            raise self.fault("an escape that is none")
        code = int(short or long or "0", 16)
        if (octal and int(octal, 8) > 255) or code > _CHAR_MAX:
            raise self.fault("an escape out of range")
        self.at = found.end()
        if short or long:
            return chr(_REPLACEMENT if 0xD800 <= code < 0xE000 else code).encode()
        if other is not None:
            return other.encode()
        return bytes([_NAMED[named] if named else int(octal, 8) if octal else int(byte, 16)])

    def peek(self) -> str:
        return self.text[self.at:self.at + 1]

    def skip_spaces(self) -> None:
        while self.peek().isspace() and self.peek() not in _SEPARATORS_OF_PYTHON:
            self.at += 1

    def fault(self, what: str) -> SnapshotInvalidError:
        before, rest = self.text[:self.at][-60:], self.text[self.at:][:60]
        return SnapshotInvalidError(f"filter: {what} at character {self.at}: {before!r} before, {rest!r} from there")


def _compile(pattern: str) -> re.Pattern[str] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # a set in a set: only a hint of Python's future
            return re.compile(pattern, re.ASCII)
    except (re.error, RecursionError, OverflowError):
        return None
