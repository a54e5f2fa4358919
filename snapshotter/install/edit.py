"""
Change a TOML file, keeping its comments, its order and everything that is not ours; and take the change back.

Layer: snapshotter.install. No I/O. The result is read again with another parser and compared with what was meant: a
file that this cannot be shown of is not written.
"""

from __future__ import annotations

import copy
import json
import tomllib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from lazyfs.errors import ConfigError, FormatError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from snapshotter.install.settings import Setting

FILE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Done:
    """One change that was made. `before`: None, the key was not there; else [its value]."""

    path: tuple[str, ...]
    before: list[Any] | None
    after: Any

    def to_json(self) -> dict[str, Any]:
        return {"path": list(self.path), "before": self.before, "after": self.after}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Done:
        """Raises FormatError: not such a record."""
        try:
            path = tuple(map(str, data["path"]))
            before = data["before"] if data["before"] is None else list(data["before"])
            return cls(path, before, data["after"])
        except (LookupError, TypeError) as error:
            raise FormatError(f"malformed record of an installation: {error}") from error


def read_toml(text: str, where: str) -> dict[str, Any]:
    """Raises ConfigError: it is not TOML."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not TOML: {error}", hint="repair it first") from error


def set_values(text: str, version: int, settings: Sequence[Setting], where: str) -> tuple[str, list[Done]]:
    """
    The file's text with the settings in it, and what changed; the same text if nothing had to.

    Raises:
        ConfigError: it is not TOML. UnsupportedError: it is written in a way that this cannot change.

    """
    meant = read_toml(text, where)
    document = tomlkit.parse(text)
    changes: list[Done] = []
    wanted = [(("version",), version), *((one.path, _wanted(meant, one)) for one in settings)]
    for path, value in wanted:
        before = _get(meant, path, where)
        if before == [value]:
            continue
        _set(meant, path, value)
        try:
            _set_kept(document, path, value)
        except (TOMLKitError, TypeError, AttributeError, KeyError) as error:
            raise _cannot(where, str(error)) from error
        changes.append(Done(path, before, value))
    return (_checked(document, meant, where) if changes else text), changes


def take_back(text: str, changes: Sequence[Done], where: str) -> tuple[str, list[str]]:
    """
    The file's text without the changes; and the keys that somebody else has changed since, which stay as they are.

    Raises:
        ConfigError, UnsupportedError: as set_values().

    """
    meant = read_toml(text, where)
    document = tomlkit.parse(text)
    left: list[str] = []
    for change in reversed(changes):
        now = _get(meant, change.path, where)
        if now is None or now == change.before:
            continue
        if now != [change.after]:
            left.append(".".join(change.path))
            continue
        try:
            if change.before is not None:
                _set(meant, change.path, change.before[0])
                _set_kept(document, change.path, change.before[0])
            elif change.path != ("version",) or set(meant) == {"version"}:
                _remove(meant, change.path)
                _remove(document, change.path)
        except (TOMLKitError, TypeError, AttributeError, KeyError) as error:
            raise _cannot(where, str(error)) from error
    return _checked(document, meant, where), left


def as_fragment(version: int, settings: Sequence[Setting]) -> str:
    """The settings alone, as a file of their own."""
    return set_values("", version, settings, "fragment")[0]


def _wanted(document: dict[str, Any], setting: Setting) -> Any:
    if not setting.append:
        return setting.value
    there = _get(document, setting.path, "") or [[]]
    present = list(there[0]) if isinstance(there[0], list) else []
    names = {one.get("snapshotter") for one in present if isinstance(one, dict)}
    if present:   # somebody chose this list: only ours is missing
        return present + [one for one in setting.value[:1] if one["snapshotter"] not in names]
    return setting.value


def _get(document: Any, path: tuple[str, ...], where: str) -> list[Any] | None:
    for part in path:
        if not isinstance(document, dict):
            raise UnsupportedError(f"{where}: expected a table at {'.'.join(path[:-1])}, found {document!r:.40}")
        if part not in document:
            return None
        document = document[part]
    return [copy.deepcopy(document)]


def _set(document: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        document = document.setdefault(part, {})
    document[path[-1]] = copy.deepcopy(value)


def _set_kept(document: Any, path: tuple[str, ...], value: Any) -> None:
    """The same in tomlkit's document; new tables are written as [a.b.c]."""
    for place, part in enumerate(path[:-1]):
        if part not in document:
            document[part] = tomlkit.table(is_super_table=place < len(path) - 2)
        document = document[part]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        array = tomlkit.aot()
        for entry in value:
            table = tomlkit.table()
            table.update(entry)
            array.append(table)
        document.pop(path[-1], None)
        document[path[-1]] = array
    else:
        document[path[-1]] = value


def _remove(document: Any, path: tuple[str, ...]) -> None:
    """The key, and the tables that are empty without it (a table that nothing is in means nothing to containerd)."""
    tables = [document]
    for part in path[:-1]:
        tables.append(tables[-1][part])
    del tables[-1][path[-1]]
    for place in range(len(path) - 2, -1, -1):
        if len(tables[place + 1]):
            break
        del tables[place][path[place]]


def _checked(document: tomlkit.TOMLDocument, meant: dict[str, Any], where: str) -> str:
    text = tomlkit.dumps(document)
    try:
        found = tomllib.loads(text)
    except ValueError as error:
        raise _cannot(where, str(error)) from error
    if json.dumps(found, sort_keys=True, default=str) != json.dumps(meant, sort_keys=True, default=str):
        raise _cannot(where, "the result would say something else")
    return text


def _cannot(where: str, why: str) -> UnsupportedError:
    return UnsupportedError(f"{where}: cannot be changed without changing other keys: {why}",
                            hint="put in by hand what this prints: lazyfs snapshotter install --print")
