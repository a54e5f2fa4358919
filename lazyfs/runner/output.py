"""
What a container says, in lines, in bounded memory. Pure.

Layer: runner. Who calls: runner.container.
"""

from __future__ import annotations

# A longer line is taken as several. It also bounds what a user's pattern is matched against: no pattern may keep us
# busy for long, and a log line of a program is shorter.
LINE_BYTES_MAX = 16 * 1024


class Lines:
    """Cuts a stream of bytes into lines without their ends."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes."""
        *whole, self._rest = (self._rest + data).split(b"\n")
        lines = [part for line in whole for part in _cut(line)]
        *long, self._rest = _cut(self._rest)
        return [*lines, *long]

    def finish(self) -> list[bytes]:
        """The last line, if it has no end."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def printable(line: bytes) -> str:
    """For a terminal: control codes of the program are shown, not obeyed."""
    text = line.decode("utf-8", "backslashreplace").rstrip("\r")
    return "".join(char if char.isprintable() or char == "\t" else char.encode("unicode_escape").decode()
                   for char in text)


def _cut(line: bytes) -> list[bytes]:
    """At least one piece, each of at most LINE_BYTES_MAX."""
    return [line[start : start + LINE_BYTES_MAX] for start in range(0, max(len(line), 1), LINE_BYTES_MAX)]
