"""
Logs of the node's processes: text for people, JSON lines for machines; no secret in either.

Layer: on top of config; light to import. Who calls: node.daemonworker, node.serving, the snapshotter: setup()
once, then the standard library's `logging`. Values for machines: `log.info("...", extra={"fields": {...}})`.

    text      2026-11-21T16:48:21.123Z INFO lazyfs.node: worker serves image=a mounts=3
    journal   <6>lazyfs.node: worker serves image=a mounts=3            (sd-daemon(3) levels; the journal has the time)
    JSON      {"time": "...", "level": "info", "logger": "lazyfs.node", "message": "...", "fields": {...}, "pid": 7}

One record is one line of JSON, and text lines of a record but the first are indented: what a registry sends cannot
forge a record. Whatever happens here, the program goes on: a disk that is full costs records, nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from lazyfs import requestid

if TYPE_CHECKING:
    from lazyfs import config

MASK = "***"
_KEPT_COUNT = 3                  # rotated files
_RECORD_CHARS_MAX = 16 * 1024    # a traceback is 4 KiB; more is cut, after it was masked
_MASKED_CHARS_MAX = 64 * 1024    # what is looked through at all
_PRIORITIES = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (logging.NOTSET, "<7>"))

_NAMES = (r"(?:(?:passw(?:or)?d|passphrase|secret|token|authorization|credential|api[_-]?key|private[_-]?key|signature|"
          r"cookie)[\w-]{0,64}|(?<![\w-])(?:auth|sig|pwd))")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,15}://)([^\s\"'<>]+)")
# Each is linear in the text: whatever repeats without a bound is followed by what it cannot be itself, or by nothing.
# What is no secret may be masked with it; the other way round must not happen.
_MASKS = (
    # Authorization: the rest of the line, whatever the scheme
    (re.compile(r"(?i)(authorization\\?[\"']?\s{0,4}[:=])[^\r\n]+"), rf"\1 {MASK}"),
    (re.compile(r"(?i)\b(bearer|basic|negotiate)(\s{1,4})(?!realm=|auth|challenge)\S{8,}"),
     rf"\1\2{MASK}"),
    # key=value, key: value, "key": "value"
    (re.compile(rf"(?i)({_NAMES}\\?[\"']?\s{{0,4}}[:=]\s{{0,4}})"
                r"(?:b?\\?\"(?:[^\"\\\r\n]|\\.)*\"|b?\\?'(?:[^'\\\r\n]|\\.)*'|\S+)"), rf"\1{MASK}"),
    # a JSON web token anywhere
    (re.compile(r"eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]*)?"), MASK),
)


def mask(text: str) -> str:
    """`text` without what looks like a secret: credentials, tokens, userinfo and queries of URLs."""
    if len(text) > _MASKED_CHARS_MAX:
        text = text[:_MASKED_CHARS_MAX]
    text = _URL.sub(_mask_url, text)
    for pattern, replacement in _MASKS:
        text = pattern.sub(replacement, text)
    return text


def _mask_url(found: re.Match[str]) -> str:
    """Without userinfo, and without all that is behind "?" or "#": signed queries."""
    rest = found[2]
    end = min((place for place in (rest.find("?"), rest.find("#")) if place >= 0), default=-1)
    query = "" if end < 0 or end + 1 == len(rest) else MASK
    rest = rest if end < 0 else rest[:end + 1]
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    return f"{found[1]}{MASK + at if at else ''}{host}{slash}{path}{query}"


def is_secret_name(name: str) -> bool:
    """Whether a field of that name is not to be shown, whatever it holds."""
    return re.search(rf"(?i)(?:{_NAMES})$", name) is not None


def setup(settings: config.Log, *, program: str) -> None:
    """
    Send this process's records where `settings` says. May be called again.

    Args:
        settings: [log] of the configuration.
        program: in JSON records: which of our processes this is.

    """
    form = settings.format if settings.format != "auto" else _form_of_stderr(to_file=bool(settings.file))
    formatter: logging.Formatter = JsonFormatter(program) if form == "json" else TextFormatter(
        journal=not settings.file and _stderr_is_journal())
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.file:
        handler = RotatingFile(settings.file, settings.file_max_bytes)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(settings.level.upper())
    logging.raiseExceptions = False   # a reader of stderr that is gone must not cost more than the record


class TextFormatter(logging.Formatter):
    """For people. `journal`: with sd-daemon's levels, without the time."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        message, trace, fields = _parts(self, record)
        if request := requestid.current():
            fields["request"] = request
        tail = "".join(f" {name}={_field_text(value)}" for name, value in fields.items())
        lines = [f"{record.name}: {_escape(message)}{tail}"]
        lines += [f"    {_escape(line)}" for line in trace.splitlines()]
        if self._journal:
            level = next(sign for least, sign in _PRIORITIES if record.levelno >= least)
            return "\n".join(level + line for line in lines)
        return f"{rfc3339(record.created)} {record.levelname} " + "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """For machines: one object a line."""

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program

    def format(self, record: logging.LogRecord) -> str:
        message, trace, fields = _parts(self, record)
        entry: dict[str, Any] = {
            "time": rfc3339(record.created), "level": record.levelname.lower(), "logger": record.name,
            "message": message, "program": self._program, "pid": record.process,
        }
        if request := requestid.current():
            entry["request"] = request
        if fields:
            entry["fields"] = fields
        if trace:
            entry["trace"] = trace
        return json.dumps(entry)


class RotatingFile(logging.Handler):
    """
    Appends to a file that several processes share, and rotates it at a size: FILE.1 is the newest of three old ones.

    Who finds the file too large locks it, looks whether it is still the one of that name, and renames. A file that
    another process (or logrotate) has renamed is left at the next record.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        super().__init__()
        self._path = path
        self._max_bytes = max_bytes
        self._descriptor = -1

    def emit(self, record: logging.LogRecord) -> None:
        """Write it. A record that cannot be written goes to standard error instead."""
        line = ""
        try:
            line = self.format(record) + "\n"
            data = line.encode("utf-8", "backslashreplace")
            if self._moved():
                self._open()
            if self._max_bytes and os.fstat(self._descriptor).st_size + len(data) > self._max_bytes:
                self._rotate()
            os.write(self._descriptor, data)
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(line)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        super().close()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o600)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor

    def _moved(self) -> bool:
        if self._descriptor < 0:
            return True
        try:
            return os.stat(self._path).st_ino != os.fstat(self._descriptor).st_ino  # noqa: PTH116 - one system call
        except FileNotFoundError:
            return True

    def _rotate(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)   # freed when it is closed, below
        if not self._moved() and os.fstat(self._descriptor).st_size > 0:
            for number in range(_KEPT_COUNT - 1, 0, -1):
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}.{number}", f"{self._path}.{number + 1}")  # noqa: PTH105
            os.replace(self._path, f"{self._path}.1")  # noqa: PTH105
        self._open()


def rfc3339(seconds: float) -> str:
    """A time as 2026-11-21T16:48:21.123Z."""
    whole, thousandths = divmod(round(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{thousandths:03d}Z"


def _parts(formatter: logging.Formatter, record: logging.LogRecord) -> tuple[str, str, dict[str, Any]]:
    """Message, traceback and fields, without secrets, bounded."""
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - a wrong format string must not take the program down
        message = str(record.msg)
    trace = formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else ""
    fields = getattr(record, "fields", None)
    found = {str(name)[:100]: MASK if is_secret_name(str(name)) else _plain(value)
             for name, value in fields.items()} if isinstance(fields, dict) else {}
    return _cut(mask(message)), _cut(mask(trace)), found


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    return _cut(mask(str(value)))


def _cut(text: str) -> str:
    return text if len(text) <= _RECORD_CHARS_MAX else text[:_RECORD_CHARS_MAX] + " …"


def _escape(text: str) -> str:
    """On one line, and without what a terminal obeys."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _field_text(value: object) -> str:
    text = _escape(str(value))
    return json.dumps(text, ensure_ascii=False) if not text or " " in text or '"' in text else text


def _form_of_stderr(*, to_file: bool) -> str:
    if to_file:
        return "json"
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if sys.stderr.isatty() or _stderr_is_journal():
            return "text"
    return "json"


def _stderr_is_journal() -> bool:
    """systemd.exec(5): JOURNAL_STREAM is device:inode of what it connected."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        status = os.fstat(sys.stderr.fileno())
        return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
    return False
