"""
Options that several commands share. Cheap to import: every command's start-up pays for it.

Who calls: lazyfs.cli.{convert,mount,inspect,check}. A password never stands on a command line (/proc shows those to
everybody): it comes from standard input or the environment.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")
PASSWORD_VARIABLE = "LAZYFS_PASSWORD"  # noqa: S105  (a name, not a password)
_PASSWORD_CHARS_MAX = 64 * 1024
JOBS_MAX = 64                    # threads of a command that converts or checks
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def registry_options(command: F) -> F:
    """Add the registry's options to a command; it gets them as keyword `registry: RegistryOptions`."""

    @click.option("--username", metavar="NAME", help="User name at the registry; applies to every registry named.")
    @click.option("--password-stdin", is_flag=True, help=f"Read the password from stdin (or set {PASSWORD_VARIABLE}).")
    @click.option("--auth-file", type=_EXISTING_FILE, metavar="FILE",
                  help="Credentials by host, as docker login writes them.  [default: ~/.docker/config.json]")
    @click.option("--insecure", is_flag=True, help="Allow plain HTTP, and certificates nobody vouches for.")
    @click.option("--ca-file", type=_EXISTING_FILE, metavar="FILE", help="Trust this authority's certificates (PEM).")
    @click.option("--client-cert", type=_EXISTING_FILE, metavar="FILE",
                  help="Show this TLS client certificate (PEM), with its key here or in --client-key.")
    @click.option("--client-key", type=_EXISTING_FILE, metavar="FILE", help="The client certificate's key (PEM).")
    @click.option("--hosts-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="DIR",
                  help="Mirrors and certificates by registry: containerd's hosts.toml files.  "
                       "[default: configured, or /etc/containerd/certs.d]")
    @functools.wraps(command)
    def with_registry(*args: Any, username: str | None, password_stdin: bool, insecure: bool, auth_file: Path | None,
                      ca_file: Path | None, client_cert: Path | None, client_key: Path | None,
                      hosts_dir: Path | None, **kwargs: Any) -> Any:
        _check_name(username, password := _password(password_stdin))
        from lazyfs import config  # noqa: PLC0415  (keeps `lazyfs --help` quick)
        from lazyfs.registry.fields import from_config  # noqa: PLC0415

        known = from_config(config.load().registry)
        kwargs["registry"] = dataclasses.replace(
            known, username=username, password=password, insecure=insecure, ca_file=ca_file, client_cert=client_cert,
            client_key=client_key, auth_file=auth_file or known.auth_file, hosts_dir=hosts_dir or known.hosts_dir)
        return command(*args, **kwargs)

    return with_registry  # type: ignore[return-value]


def platform_option(command: F, default: str = "this machine's") -> F:
    """Add `--platform`; the command gets it as keyword `platform: str | None`; what None means to it is `default`."""
    option = click.option("--platform", metavar="OS/ARCH[/VARIANT]",
                          help=f"Which image of an index, for example linux/arm64.  [default: {default}]")
    return option(command)


def processors() -> int:
    """Those this process may use; a container often may use fewer than there are."""
    return min(len(os.sched_getaffinity(0)), JOBS_MAX)


def _password(from_stdin: bool) -> str | None:
    if not from_stdin:
        return os.environ.get(PASSWORD_VARIABLE) or None
    line = sys.stdin.readline(_PASSWORD_CHARS_MAX).rstrip("\r\n")
    if not line:
        raise UsageError("--password-stdin: nothing came from standard input",
                         hint="pipe the password in, for example: lazyfs … --password-stdin < password.txt")
    return line


def _check_name(username: str | None, password: str | None) -> None:
    if username is not None and password is None:
        raise UsageError("--username was given, but no password",
                         hint=f"add --password-stdin, or set {PASSWORD_VARIABLE}")
    if username is None and password is not None:
        raise UsageError("a password was given, but no user name", hint="add --username")
