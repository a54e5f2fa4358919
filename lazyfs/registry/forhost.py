"""
What one command's options say about a registry that a configuration does not.

Layer: registry. Who calls: cli.pull, because the node's daemon, not the pull, fetches most of a lazy image. No I/O but
a look at the directory of hosts.toml files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs.registry.addresses import is_loopback_host, origin_of
from lazyfs.registry.hosts import Stamp, stamp

if TYPE_CHECKING:
    from lazyfs.registry.options import RegistryOptions


def missing_settings(given: RegistryOptions, configured: RegistryOptions, host: str) -> list[str]:
    """
    Keys of [registry.host."HOST"] that the configuration needs to do what was done with the options given.

    Args:
        given: those of a command, made of the configuration and of its own.
        configured: those of the configuration alone.
        host: of the registry, with its port.

    """
    known = configured.for_host(host)
    own = configured.hosts.get(host)
    by_hosts_toml = stamp(configured.hosts_dir, host) != Stamp()   # what it says about trust is for the administrator
    plain_is_allowed = is_loopback_host(origin_of(f"https://{host}").host)
    missing = []
    if given.username and not (own and own.username):
        missing += ["username", "password_file"]
    if given.insecure and not (known.insecure or by_hosts_toml or plain_is_allowed):
        missing.append("insecure")
    if given.ca_file and not (known.ca_file or by_hosts_toml):
        missing.append("ca_file")
    if given.client_cert and not (known.client_cert or by_hosts_toml):
        missing += ["client_cert", "client_key"]
    return missing
