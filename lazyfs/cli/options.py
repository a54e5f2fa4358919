"""
Options that several commands share. Cheap to import: every command's start-up pays for it.

Who calls: lazyfs.cli.{convert,mount,inspect,check}. A password never stands on a command line (/proc shows those to
everybody): it comes from standard input or the environment.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from lazyfs.registry import RegistryOptions

F = TypeVar("F", bound="Callable[..., Any]")
PASSWORD_VARIABLE = "LAZYFS_PASSWORD"  # noqa: S105  (a name, not a password)
_PASSWORD_CHARS_MAX = 64 * 1024
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def registry_options(command: F) -> F:
    """Add the registry's options to a command; it gets them as keyword `registry: RegistryOptions`."""

    @click.option("--username", metavar="NAME", help="User name at the registry; applies to every registry named.")
    @click.option("--password-stdin", is_flag=True, help=f"Read the password from stdin (or set {PASSWORD_VARIABLE}).")
    @click.option("--auth-file", type=_EXISTING_FILE, metavar="FILE",
                  help="Credentials by host, as docker login writes them.  [default: ~/.docker/config.json]")
    @click.option("--insecure", is_flag=True, help="Allow plain HTTP, and certificates nobody vouches for.")
    @click.option("--ca-file", type=_EXISTING_FILE, metavar="FILE", help="Trust this authority's certificates (PEM).")
    @functools.wraps(command)
    def with_registry(*args: Any, username: str | None, password_stdin: bool, auth_file: Path | None,
                      insecure: bool, ca_file: Path | None, **kwargs: Any) -> Any:
        password = _password(password_stdin)
        kwargs["registry"] = _make_options(username, password, auth_file, insecure=insecure, ca_file=ca_file)
        return command(*args, **kwargs)

    return with_registry  # type: ignore[return-value]


def platform_option(command: F) -> F:
    """Add `--platform`; the command gets it as keyword `platform: str | None`."""
    option = click.option("--platform", metavar="OS/ARCH[/VARIANT]",
                          help="Which image of an index, for example linux/arm64.  [default: this machine's]")
    return option(command)


def _password(from_stdin: bool) -> str | None:
    if not from_stdin:
        return os.environ.get(PASSWORD_VARIABLE) or None
    line = sys.stdin.readline(_PASSWORD_CHARS_MAX).rstrip("\r\n")
    if not line:
        raise UsageError("--password-stdin: nothing came from standard input",
                         hint="pipe the password in, for example: lazyfs … --password-stdin < password.txt")
    return line


def _make_options(username: str | None, password: str | None, auth_file: Path | None, *,
                  insecure: bool, ca_file: Path | None) -> RegistryOptions:
    if username is not None and password is None:
        raise UsageError("--username was given, but no password",
                         hint=f"add --password-stdin, or set {PASSWORD_VARIABLE}")
    if username is None and password is not None:
        raise UsageError("a password was given, but no user name", hint="add --username")

    from lazyfs.registry import RegistryOptions  # noqa: PLC0415  (keeps `lazyfs --help` quick)

    return RegistryOptions(username=username, password=password, auth_file=auth_file, insecure=insecure,
                           ca_file=ca_file)
