"""
Registry options as plain fields and back: for mount orders (JSON), and out of the node's configuration.

Layer: registry; light to import. Who calls: node.order, cli.mount, the snapshotter. Fields may hold a password (the
command line's): they go over a control socket only. Those of a configuration hold none.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyfs.errors import UsageError
from lazyfs.registry.options import HostSettings, RegistryOptions, Secret

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.config import Registry as RegistryConfig

_HOST_PATHS = frozenset({"password_file", "ca_file", "client_cert", "client_key"})
_PATHS = frozenset({"ca_file", "auth_file", "client_cert", "client_key", "hosts_dir", "provider_config",
                    "provider_bin_dir"})


def to_fields(options: RegistryOptions) -> dict[str, Any]:
    """What differs from the defaults, as JSON values; paths absolute."""
    found = _plain(options, _PATHS, RegistryOptions())
    if options.hosts:
        found["hosts"] = {name: _plain(one, _HOST_PATHS, HostSettings()) for name, one in options.hosts.items()}
    return found


def _plain(value: Any, paths: frozenset[str], default: Any) -> dict[str, Any]:
    found = {}
    for one in fields(value):
        content = getattr(value, one.name)
        if one.name == "hosts" or content == getattr(default, one.name):
            continue
        if one.name in paths:
            content = str(content.absolute())
        found[one.name] = content.reveal() if isinstance(content, Secret) else content
    return found


def from_fields(plain: Mapping[str, Any]) -> RegistryOptions:
    """
    The options that to_fields() wrote down.

    Raises:
        UsageError: these are not such fields (none of their content is shown).

    """
    try:
        hosts = {name: HostSettings(**_with_paths(one, _HOST_PATHS)) for name, one in plain.get("hosts", {}).items()}
        shown = {"shown": Secret(plain["shown"])} if plain.get("shown") is not None else {}
        return RegistryOptions(**_with_paths({**plain, "hosts": hosts, **shown}, _PATHS))
    except (TypeError, AttributeError):
        raise UsageError("these are no registry options",
                         hint="do the command and the daemon have the same version? lazyfs daemon upgrade") from None


def _with_paths(plain: Mapping[str, Any], paths: frozenset[str]) -> dict[str, Any]:
    return {name: Path(value) if name in paths and value is not None else value for name, value in plain.items()}


def from_config(config: RegistryConfig) -> RegistryOptions:
    """What the configuration's [registry] says."""

    def path(text: str) -> Path | None:
        return Path(text) if text else None

    hosts = {
        name: HostSettings(username=one.username, password_file=path(one.password_file), insecure=one.insecure,
                           allow_private=one.allow_private, ca_file=path(one.ca_file),
                           client_cert=path(one.client_cert), client_key=path(one.client_key))
        for name, one in config.host.items()
    }
    return RegistryOptions(
        auth_file=path(config.docker_config) or default_auth_file(), hosts_dir=path(config.hosts_dir),
        provider_config=path(config.credential_provider_config),
        provider_bin_dir=path(config.credential_provider_bin_dir), hosts=hosts,
        allow_private=config.allow_private,
    )


def default_auth_file() -> Path | None:
    """This user's credentials file, if it is there: a worker's home directory may be another one."""
    named, directory = os.environ.get("REGISTRY_AUTH_FILE"), os.environ.get("DOCKER_CONFIG")
    if named:
        return Path(named)
    path = Path(directory) if directory else Path(os.environ.get("HOME") or "/root") / ".docker"
    return path / "config.json" if (path / "config.json").is_file() else None
