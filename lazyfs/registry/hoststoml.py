"""
A hosts.toml of containerd's, strictly read: the mirrors of a registry, and what to show to each.

Layer: registry, no I/O. Who calls: hosts.py. Keys: server, capabilities, ca, client, skip_verify, header,
override_path, dial_timeout, and the same below [host."URL"]. What is wrong in it is a UsageError with file and line; a
key that we do not know (containerd gains some) is handed back, to be warned of. Values of headers are secrets: some
hold a token.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn
from urllib.parse import urlsplit

from lazyfs.errors import SourceError, UsageError
from lazyfs.registry.addresses import Origin, origin_of, printable
from lazyfs.registry.options import Secret

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

PULL, RESOLVE, PUSH = "pull", "resolve", "push"
_CAPABILITIES: Final = {PULL, RESOLVE, PUSH, "referrers"}
_KEYS: Final = {"capabilities", "ca", "client", "skip_verify", "header", "override_path", "dial_timeout"}
HOST_COUNT_MAX = 32        # each may cost a timeout
_LIST_COUNT_MAX = 64
_TEXT_CHARS_MAX = 8192
_PATH = re.compile(r"(?:/[A-Za-z0-9._~!$&'()*+,;=:@%-]*)*\Z")
_HEADER_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]{1,256}\Z")
_HEADER_VALUE = re.compile(r"[\x20-\x7e\t]*\Z")
# Those that say where a message ends, or that we set ourselves.
_HEADERS_REFUSED: Final = {"host", "content-length", "transfer-encoding", "connection", "range", "accept-encoding",
                           "upgrade", "te", "trailer", "expect", "content-type", "accept"}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ns|us|µs|ms|s|m|h)")
_UNITS_S: Final = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DIAL_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class HostEntry:
    """
    One server to ask. `origin` None: the registry's own, by its name. `prefix`: what stands before /NAME/blobs/...

    `dial_timeout_s` None: the options'. `client_pairs`: certificate and key, None: in the same file.
    """

    origin: Origin | None = None
    prefix: str = "/v2"
    capabilities: frozenset[str] = frozenset(_CAPABILITIES)
    skip_verify: bool = False
    ca_files: tuple[Path, ...] = ()
    client_pairs: tuple[tuple[Path, Path | None], ...] = ()
    headers: tuple[tuple[str, Secret], ...] = ()
    dial_timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class HostsFile:
    """`mirrors` in order, then `server`. `unknown`: keys that mean nothing to us, as "line N: KEY"."""

    mirrors: tuple[HostEntry, ...]
    server: HostEntry
    unknown: tuple[str, ...] = ()


def parse_hosts_toml(text: str, path: Path) -> HostsFile:
    """Raises UsageError: it is not what containerd would read, or nothing to be trusted with requests."""
    return _Parser(text, path).parse()


class _Parser:
    def __init__(self, text: str, path: Path) -> None:
        self._text = text
        self._path = path
        self._unknown: list[str] = []

    def parse(self) -> HostsFile:
        import tomllib  # noqa: PLC0415 - where there are no such files, nobody pays for it

        try:
            content = tomllib.loads(self._text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
            raise UsageError(f"{self._path}: not TOML: {str(error)[:200]}", hint="see docs/credentials.md") from None
        hosts = content.pop("host", {})
        server = content.pop("server", "")
        if not isinstance(hosts, dict) or not all(isinstance(one, dict) for one in hosts.values()):
            self._refuse('expected tables [host."URL"]', (), "host")
        if len(hosts) > HOST_COUNT_MAX:
            self._refuse(f"more than {HOST_COUNT_MAX} hosts", (), "host")
        if not isinstance(server, str):
            self._refuse("expected a URL as text", (), "server")
        last = self._entry(server, content, (), "server")
        mirrors = tuple(self._entry(url, one, ("host", url), "") for url, one in hosts.items())
        return HostsFile(mirrors, last, tuple(self._unknown))

    def _entry(self, url: str, table: Mapping[str, Any], section: tuple[str, ...], key: str) -> HostEntry:
        for name in table:
            if name not in _KEYS:
                self._unknown.append(f"line {self._line(section, name)}: {name[:60]!r}")
        override = self._flag(table, "override_path", section)
        origin, prefix = self._address(url, override, section, key) if url or section else (None, "/v2")
        return HostEntry(
            origin, prefix,
            self._capabilities(table, section),
            self._flag(table, "skip_verify", section),
            tuple(self._file(one, section, "ca") for one in self._texts(table, "ca", section)),
            self._client_pairs(table, section),
            self._headers(table, section),
            self._duration(table, section),
        )

    def _address(self, url: str, override: bool, section: tuple[str, ...], key: str) -> tuple[Origin, str]:
        full = url if "://" in url else f"https://{url}"
        try:
            origin, parts = origin_of(full), urlsplit(full)
        except (SourceError, ValueError):
            self._refuse(f"{printable(full)!r} is no address: expected https://HOST[:PORT][/PATH]", section, key)
        if parts.username is not None or parts.password is not None:
            self._refuse("a URL with a user name: credentials do not stand here", section, key)
        if parts.query or parts.fragment or not _PATH.match(parts.path) or ".." in parts.path.split("/"):
            self._refuse("a URL with a query, or a path that is none", section, key)
        path = posixpath.normpath(parts.path) if parts.path.strip("/") else ""
        path = "/" + path.lstrip("/") if path else ""
        if not override and not path.endswith("/v2"):
            path += "/v2"
        return origin, path

    def _capabilities(self, table: Mapping[str, Any], section: tuple[str, ...]) -> frozenset[str]:
        if "capabilities" not in table:
            return frozenset(_CAPABILITIES)
        found = frozenset(self._texts(table, "capabilities", section))
        if wrong := found - _CAPABILITIES:
            self._refuse(f"unknown capability {min(wrong)[:40]!r}: expected pull, resolve, push", section,
                         "capabilities")
        return found

    def _client_pairs(self, table: Mapping[str, Any],
                      section: tuple[str, ...]) -> tuple[tuple[Path, Path | None], ...]:
        """A file with both, or a list of such files and of [certificate, key]."""
        value = table.get("client", [])
        pairs: list[tuple[Path, Path | None]] = []
        for one in [value] if isinstance(value, str) else self._bounded(value, section, "client"):
            names = [one] if isinstance(one, str) else one
            if not isinstance(names, list) or not 1 <= len(names) <= 2 or not all(isinstance(n, str) for n in names):
                self._refuse("expected a file, or [certificate, key], or a list of those", section, "client")
            key = self._file(names[1], section, "client") if len(names) == 2 and names[1] else None
            pairs.append((self._file(names[0], section, "client"), key))
        return tuple(pairs)

    def _headers(self, table: Mapping[str, Any], section: tuple[str, ...]) -> tuple[tuple[str, Secret], ...]:
        value = table.get("header", {})
        if not isinstance(value, dict) or len(value) > _LIST_COUNT_MAX:
            self._refuse("expected a table of headers", section, "header")
        inner = (*section, "header")
        found = []
        for name in value:
            if not _HEADER_NAME.match(name) or name.lower() in _HEADERS_REFUSED:
                self._refuse(f"header {name[:60]!r} cannot be set", inner, name)
            texts = self._texts(value, name, inner)
            if not all(_HEADER_VALUE.match(text) for text in texts):
                self._refuse(f"header {name[:60]!r} holds characters that none may hold", inner, name)
            if texts:
                found.append((name, Secret(", ".join(texts))))
        return tuple(found)

    def _duration(self, table: Mapping[str, Any], section: tuple[str, ...]) -> float | None:
        value = table.get("dial_timeout")
        if value is None:
            return None
        seconds = duration_s(value) if isinstance(value, str) else None
        if seconds is None or not 0 < seconds <= _DIAL_S_MAX:
            self._refuse('expected a duration up to 5m, for example "200ms"', section, "dial_timeout")
        return seconds

    # --- kinds of values ------------------------------------------------------------------------------------------

    def _flag(self, table: Mapping[str, Any], key: str, section: tuple[str, ...]) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            self._refuse("expected true or false", section, key)
        return value

    def _texts(self, table: Mapping[str, Any], key: str, section: tuple[str, ...]) -> list[str]:
        """A text, or a list of texts."""
        value = table.get(key, [])
        found = [value] if isinstance(value, str) else self._bounded(value, section, key)
        if not all(isinstance(one, str) and len(one) <= _TEXT_CHARS_MAX for one in found):
            self._refuse("expected a text or a list of texts", section, key)
        return found

    def _bounded(self, value: Any, section: tuple[str, ...], key: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > _LIST_COUNT_MAX:
            self._refuse(f"expected a list of at most {_LIST_COUNT_MAX}", section, key)
        return value

    def _file(self, name: str, section: tuple[str, ...], key: str) -> Path:
        if not name or "\0" in name or len(name) > 4096:
            self._refuse("expected the name of a file", section, key)
        return self._path.parent / name

    def _refuse(self, what: str, section: tuple[str, ...], key: str) -> NoReturn:
        where = f"{self._path}, line {self._line(section, key)}"
        raise UsageError(f"{where}: {key + ': ' if key else ''}{what}", hint="see docs/credentials.md")

    def _line(self, section: tuple[str, ...], key: str) -> int:
        """The line where `key` of a table is, or where the table begins."""
        current: tuple[str, ...] = ()
        begins = 1
        for number, line in enumerate(self._text.splitlines(), 1):
            bare = line.strip()
            if bare.startswith("["):
                current = _table_of(bare)
                if current == section or (not section and current[:1] == (key,)):
                    begins = number
            elif current == section and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", bare):
                return number
        return begins


def _table_of(line: str) -> tuple[str, ...]:
    """The path of a table's header line."""
    import tomllib  # noqa: PLC0415 - as above

    try:
        content: Any = tomllib.loads(line)
    except ValueError:
        return ()
    path: list[str] = []
    while isinstance(content, dict) and content:
        name, content = next(iter(content.items()))
        path.append(name)
    return tuple(path)


def duration_s(text: str) -> float | None:
    """Seconds of a duration as Go writes them (12h0m0.5s); None: it is none."""
    if text == "0":
        return 0.0
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        return None
    return sum(float(number) * _UNITS_S[unit] for number, unit in parts)
