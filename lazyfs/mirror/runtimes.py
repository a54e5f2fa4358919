"""
How container runtimes are told about the mirror: the files, and what is to stand in them. Pure.

Layer: mirror. Who calls: mirror.installing. containerd and Docker's containerd store read hosts.toml; Docker's older
store reads daemon.json, for Docker Hub only; Podman and CRI-O read registries.conf. Each asks the mirror first, then
the registry as before. What an administrator wrote stays as it is, but for what is added.
"""

from __future__ import annotations

import json
import tomllib
from typing import Any, Final

from lazyfs.errors import ConfigError, TargetError
from lazyfs.registry.hosts import OWN_MIRROR
from lazyfs.registry.reference import DOCKER_HUB

MARK: Final = "# Written by `lazyfs mirror install`; `lazyfs mirror uninstall` takes it out again."
_DIAL: Final = "200ms"            # a mirror that is not there costs no more


def hosts_directory(registry: str) -> str:
    """The name of its directory, as containerd looks for it on every system; "": of all that have none."""
    host, colon, port = registry.rpartition(":")
    return f"{host}_{port}_" if colon else registry or "_default"


def in_hosts_toml(text: str, address: str, where: str) -> str | None:
    """
    A hosts.toml with the mirror as its first host; None: it is there already.

    Raises:
        ConfigError: this is no hosts.toml that can be added to.

    """
    before = _toml(text, where)
    url = f"http://{address}"
    hosts = before.get("host", {})
    if not isinstance(hosts, dict):
        raise ConfigError(f'{where}: expected tables [host."URL"]', hint="repair it first")
    if url in hosts:
        return None
    block = (f'[host."{url}"]\n  capabilities = ["pull", "resolve"]\n  dial_timeout = "{_DIAL}"\n'
             f'  [host."{url}".header]\n    {OWN_MIRROR} = "lazyfs"\n')
    lines = text.splitlines(keepends=True)
    at = next((number for number, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    if lines and not lines[at - 1].endswith("\n") and at == len(lines):
        lines[-1] += "\n"
    changed = "".join([*lines[:at], f"{MARK}\n", block, *lines[at:]])
    after = _toml(changed, where)
    if next(iter(after["host"])) != url or {**after, "host": {**after["host"], url: None}} != {
            **before, "host": {**hosts, url: None}}:
        raise ConfigError(f"{where}: the mirror cannot be put before its other hosts",
                          hint=f'add it by hand: [host."{url}"]')
    return changed


def registries_conf(registries: list[str], address: str) -> str:
    """A file for registries.conf.d: each registry's images are asked for at the mirror first."""
    parts = [MARK]
    for name in registries:
        place = name.replace(":", "__")       # mirror.route reads it; a colon cannot stand there
        parts.append(f'[[registry]]\nprefix = "{name}"\nlocation = "{name}"\n[[registry.mirror]]\n'
                     f'location = "{address}/{place}"\ninsecure = true\n')
    return "\n".join(parts)


def check_registries(texts: dict[str, str], registries: list[str]) -> None:
    """Raises TargetError: another file speaks of one of them already, and only one of the two would count."""
    for where, text in texts.items():
        for one in _toml(text, where).get("registry", []):
            name = one.get("prefix") or one.get("location") if isinstance(one, dict) else None
            if name in registries:
                raise TargetError(f"{where} has a [[registry]] for {name}",
                                  hint="add the mirror there by hand, or leave this registry out: --registry")


def in_daemon_json(text: str, address: str, where: str) -> str | None:
    """
    Docker's daemon.json with the mirror as first of registry-mirrors; None: it is there already.

    Raises:
        ConfigError: it is not JSON of an object.

    """
    try:
        found: Any = json.loads(text) if text.strip() else {}
        mirrors = found.get("registry-mirrors", [])
        listed = [str(one).rstrip("/") for one in mirrors]
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where}: not the JSON that Docker reads", hint="repair it first") from error
    if f"http://{address}" in listed:
        return None
    return json.dumps({**found, "registry-mirrors": [f"http://{address}", *mirrors]}, indent=4) + "\n"


def podman_registries(named: list[str]) -> list[str]:
    """Podman knows no "all": Docker Hub, where none is named."""
    return named or [DOCKER_HUB]


def _toml(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not TOML: {str(error)[:200]}", hint="repair it first") from error
