r"""
The text of prefetch lists: parsing, and writing back. The grammar is in docs/format.md.

    # lazyfs-prefetch 1
    # image: registry.example/app@sha256:...
    # runs: 3
    usr/lib/libc.so.6 0-65535,1048576- share=0.67 ms=12
    "opt/a file with spaces \xff"

A *pattern* is a line's path as it is matched: components joined by slashes, a character that is to mean itself and
not a glob as a class of one (`[*]`). `pattern` and exact paths lead to each other: exact_pattern, literal_path.

Layer: lazyfs.image, no I/O. Text is hostile: FormatError, with the line's number, and bounds on everything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

PREFETCH_VERSION = 1
LIST_BYTES_MAX = 64 * limits.MIB
ENTRY_COUNT_MAX = 1_000_000      # lines; a recorded start has some thousands
LINE_COUNT_MAX = 2 * ENTRY_COUNT_MAX    # with comments
RANGE_COUNT_MAX = 2_000_000      # in all lines together
RUNS_MAX = 1_000_000             # merged into one list
_FIELD_CHARS_MAX = 4096          # of a header line: an image's name
_HEADER = "# lazyfs-prefetch "
_RANGES = re.compile(r"\d{1,19}-(?:\d{1,19})?(?:,\d{1,19}-(?:\d{1,19})?)*")
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"(?:\s+(.*))?')
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|[0-7]{1,3}|.)", re.DOTALL)
_SIMPLE_ESCAPES = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"\\": b"\\", b'"': b'"'}
GLOB_CHARACTERS = b"*?["
_PLAIN_PATH = re.compile(rb"[A-Za-z0-9._/+@%=~:,-]+")
_PLAIN_PATTERN = re.compile(rb"[A-Za-z0-9._/+@%=~:,*?\[\]!^-]+")
_GLOB_CHARACTER = re.compile(rb"[*?\[]")
_CLASS_OF_ONE = re.compile(rb"\[([*?\[])\]|[*?\[]")
_FIELD = re.compile(r"#\s*(image|tool|runs|made):\s*(.*)")
_SHARE = re.compile(r"0\.\d{1,6}|1(?:\.0{1,6})?", re.ASCII)
_MS = re.compile(r"\d{1,10}(?:\.\d{1,3})?", re.ASCII)     # up to four months
_ATTRIBUTES = {"share": _SHARE, "ms": _MS}
_RUNS = re.compile(r"\d{1,7}", re.ASCII)


@dataclass(frozen=True, slots=True)
class PrefetchEntry:
    """
    One line.

    Attributes:
        components: of the pattern.
        ranges: [start, end) in bytes, end None: to the file's end; none: the whole file.
        line: as it stands in the text.
        share: of the runs, how many touched it; above 0, at most 1.
        first_ms: after the recording began, when it was first touched; None: not said.

    """

    components: tuple[bytes, ...]
    ranges: tuple[tuple[int, int | None], ...]
    line: str
    share: float = 1.0
    first_ms: float | None = None

    @property
    def pattern(self) -> bytes:
        return b"/".join(self.components)


@dataclass(frozen=True, slots=True)
class PrefetchHeader:
    """Where a list comes from; empty: not said. `runs`: how many recordings are merged in it."""

    image: str = ""
    tool: str = ""
    runs: int = 1
    made: str = ""


@dataclass(frozen=True, slots=True)
class PrefetchList:
    entries: tuple[PrefetchEntry, ...]
    header: PrefetchHeader = PrefetchHeader()


def parse_prefetch(text: str | bytes) -> PrefetchList:
    """
    Read a prefetch list.

    Raises:
        UnsupportedError: of another version.
        FormatError: a line is malformed; the message gives its number.

    """
    if len(text) > LIST_BYTES_MAX:
        raise FormatError(f"prefetch list of {len(text)} bytes, at most {LIST_BYTES_MAX} are allowed")
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"prefetch list is not UTF-8 at byte {error.start}",
                              hint="write such a path in quotes, its odd bytes as \\xHH") from error
    if text.count("\n") > LINE_COUNT_MAX:
        raise FormatError(f"prefetch list of more than {LINE_COUNT_MAX} lines")
    entries: list[PrefetchEntry] = []
    lines = text.split("\n")
    range_count = 0
    for number, line in enumerate(lines, 1):
        stripped = line.strip()
        if number == 1:
            _check_version(stripped)
        if not stripped or stripped.startswith("#"):
            continue
        if len(entries) >= ENTRY_COUNT_MAX:
            raise FormatError(f"prefetch list of more than {ENTRY_COUNT_MAX} lines")
        range_count += line.count(",") + 1       # before they are made: a range of two characters becomes an object
        if range_count > RANGE_COUNT_MAX:
            raise FormatError(f"prefetch list of more than {RANGE_COUNT_MAX} ranges")
        entries.append(_parse_line(stripped, number))
    return PrefetchList(tuple(entries), _parse_header(lines))


def format_prefetch(prefetch: PrefetchList) -> str:
    """The list's text; parse_prefetch gives the same list back, if its entries were made by format_entry."""
    header = prefetch.header
    fields = [("image", header.image), ("tool", header.tool), ("runs", str(header.runs) if header.runs > 1 else ""),
              ("made", header.made)]
    named = [f"# {name}: {value}" for name, value in fields if value]
    return "\n".join([f"{_HEADER}{PREFETCH_VERSION}", *named, *(entry.line for entry in prefetch.entries), ""])


def exact_pattern(path: bytes) -> bytes:
    """The pattern that matches this path and no other."""
    return _GLOB_CHARACTER.sub(rb"[\g<0>]", path)


def literal_path(pattern: bytes) -> bytes | None:
    """The one path that a pattern matches (symlinks on the way aside); None: it is a glob."""
    globs = 0

    def unwrap(match: re.Match[bytes]) -> bytes:
        nonlocal globs
        globs += match[1] is None
        return match[1] or b""

    path = _CLASS_OF_ONE.sub(unwrap, pattern)
    return None if globs else path


def format_pattern(pattern: bytes) -> str:
    """The first word of a line: bare if it can be, else in quotes."""
    path = literal_path(pattern)
    if path is None:
        plain, text, kept = _PLAIN_PATTERN.fullmatch(pattern), pattern, GLOB_CHARACTERS
    else:
        plain, text, kept = _PLAIN_PATH.fullmatch(path), path, b""
    if plain:
        return text.decode("ascii")
    return '"' + "".join(chr(byte) if byte in kept else _quote_byte(byte) for byte in text) + '"'


def format_entry(path: bytes, ranges: Sequence[tuple[int, int | None]] = ()) -> str:
    """The line that names exactly this file (no glob) and these ranges, [start, end)."""
    return make_entry(exact_pattern(path), ranges).line


def make_entry(
    pattern: bytes, ranges: Sequence[tuple[int, int | None]] = (), share: float = 1.0, first_ms: float | None = None
) -> PrefetchEntry:
    """An entry with its line. `share` is written with six digits, `first_ms` with three: what is written counts."""
    words = [format_pattern(pattern)]
    if ranges:
        words.append(",".join(f"{start}-{end - 1 if end is not None else ''}" for start, end in ranges))
    share_text = f"{max(share, 0.000001):.6f}".rstrip("0").rstrip(".")
    if share_text != "1":
        words.append(f"share={share_text}")
    ms_text = None
    if first_ms is not None:
        ms_text = f"{first_ms:.3f}".rstrip("0").rstrip(".")
        words.append(f"ms={ms_text}")
    return PrefetchEntry(tuple(pattern.split(b"/")), tuple(ranges), " ".join(words), float(share_text),
                         None if ms_text is None else float(ms_text))


# --- parsing --------------------------------------------------------------------------------------------------------


def _parse_line(line: str, number: int) -> PrefetchEntry:
    where = f"prefetch list, line {number}"
    if line.startswith('"'):
        quoted = _QUOTED.fullmatch(line)
        if quoted is None:
            raise FormatError(f"{where}: no closing quote, or no blank after it")
        pattern, rest = _unescape(quoted[1], where), quoted[2] or ""
    else:
        bare, _, rest = line.replace("\t", " ").partition(" ")
        if "\\" in bare or '"' in bare:
            raise FormatError(f"{where}: a backslash or quote outside of quotes",
                              hint='write the whole path in quotes, with \\\\ and \\"')
        pattern = bare.encode("utf-8", "surrogateescape")
    return _parse_rest(_split(pattern, where), rest.split(), line, where)


def _parse_rest(components: tuple[bytes, ...], words: list[str], line: str, where: str) -> PrefetchEntry:
    """Ranges, then attributes; either may be missing."""
    ranges = _parse_ranges(words.pop(0), where) if words and "=" not in words[0] else ()
    found: dict[str, float] = {}
    for word in words:
        name, equals, value = word.partition("=")
        form = _ATTRIBUTES.get(name)
        if not equals or form is None or name in found or form.fullmatch(value) is None or (
                name == "share" and float(value) == 0):
            raise FormatError(f"{where}: {word[:100]!r} is no attribute, or stands there twice",
                              hint="attributes are share=0.67 (above 0, at most 1) and ms=12")
        found[name] = float(value)
    return PrefetchEntry(components, ranges, line, found.get("share", 1.0), found.get("ms"))


def _check_version(first_line: str) -> None:
    if first_line.startswith(_HEADER) and first_line != f"{_HEADER}{PREFETCH_VERSION}":
        raise UnsupportedError(f"prefetch list of version {first_line[len(_HEADER):][:40]!r}: expected "
                               f"{PREFETCH_VERSION}")


def _parse_header(lines: list[str]) -> PrefetchHeader:
    """The comment lines right behind the first one, if that names the version; those with other words say nothing."""
    fields: dict[str, str] = {}
    if lines[0].strip() != f"{_HEADER}{PREFETCH_VERSION}":
        return PrefetchHeader()
    for number, line in enumerate(lines[1:], 2):
        if not line.strip().startswith("#"):
            break
        field = _FIELD.fullmatch(line.strip())
        if field is None:
            continue
        name, value = field.groups()
        if name in fields or len(value) > _FIELD_CHARS_MAX or not value.isprintable():
            raise FormatError(f"prefetch list, line {number}: {name} stands there twice, is too long, or no plain text")
        if name == "runs" and not (_RUNS.fullmatch(value) and 0 < int(value) <= RUNS_MAX):
            raise FormatError(f"prefetch list, line {number}: runs: expected a number from 1 to {RUNS_MAX}, "
                              f"found {value[:40]!r}")
        fields[name] = value
    return PrefetchHeader(fields.get("image", ""), fields.get("tool", ""), int(fields.get("runs", "1")),
                          fields.get("made", ""))


def _split(pattern: bytes, where: str) -> tuple[bytes, ...]:
    collapsed: list[bytes] = []
    for part in pattern.split(b"/"):
        if part not in (b"", b".") and not (part == b"**" and collapsed[-1:] == [part]):
            collapsed.append(part)
    size = len(_CLASS_OF_ONE.sub(b"x", pattern))       # what is escaped counts once, as in the path
    if not collapsed or size > limits.PATH_BYTES_MAX or b".." in collapsed or b"\0" in pattern:
        raise FormatError(f"{where}: not a path within the image: {pattern[:200]!r}")
    return tuple(collapsed)


def _parse_ranges(text: str, where: str) -> tuple[tuple[int, int | None], ...]:
    if not text:
        return ()
    if not _RANGES.fullmatch(text) or not text.isascii():
        raise FormatError(f"{where}: {text[:100]!r} is no list of byte ranges",
                          hint="for example 0-65535,1048576- ; a path with blanks must be in quotes")
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise FormatError(f"{where}: range {part} ends before it begins")
        start, end = int(first), min(int(last) + 1, limits.FILE_BYTES_MAX) if last else None
        ranges.append((min(start, limits.FILE_BYTES_MAX), end))
    return tuple(ranges)


def _unescape(text: str, where: str) -> bytes:
    def replace(match: re.Match[bytes]) -> bytes:
        escape = match[1]
        if escape in _SIMPLE_ESCAPES:
            return _SIMPLE_ESCAPES[escape]
        if len(escape) == 1 and escape in GLOB_CHARACTERS:
            return b"[" + escape + b"]"          # means itself: a class of one
        try:
            value = int(escape[1:], 16) if escape[:1] == b"x" else int(escape, 8)
        except ValueError:
            value = 256
        if value > 255 or (escape[:1] == b"x" and len(escape) != 3):
            raise FormatError(f"{where}: unknown escape \\{escape.decode('latin-1')}")
        byte = bytes([value])
        return b"[" + byte + b"]" if byte in GLOB_CHARACTERS else byte

    return _ESCAPE.sub(replace, text.encode("utf-8", "surrogateescape"))


def _quote_byte(byte: int) -> str:
    char = chr(byte)
    if char in '"\\*?[':
        return "\\" + char
    return char if " " <= char <= "~" else f"\\x{byte:02x}"
