"""`lazyfs config`: check a configuration, show what is in force. Thin; the work is in lazyfs.config."""

from __future__ import annotations

import json
import sys

import click

from lazyfs import config
from lazyfs.errors import ConfigError

_EPILOG = """\b
Examples:
  lazyfs config check /etc/lazyfs/config.toml   what is wrong with it, a line each; exit code 0: nothing
  lazyfs config show                            values in force, and where each comes from
  lazyfs config show --defaults > config.toml   a file to begin from: every key, explained
"""
_FILE = click.argument("file", metavar="[FILE]", required=False)


@click.group("config", epilog=_EPILOG, short_help="Check or show the configuration.")
def config_command() -> None:
    """Check or show the configuration: FILE, or /etc/lazyfs/config.toml; LAZYFS_<SECTION>_<KEY> override it."""


@config_command.command("check")
@_FILE
def check_command(file: str | None) -> None:
    """Say what is wrong with FILE and with the environment."""
    found, problems = config.check(file)
    for problem in problems:
        print(f"{problem}{f' ({problem.hint})' if problem.hint else ''}", file=sys.stderr)
    if problems:
        sys.exit(ConfigError.exit_code)
    print(f"{found.file or 'defaults'}: no problem, {len(found.origins)} keys are set")


@config_command.command("show")
@_FILE
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with origins and units.")
@click.option("--defaults", is_flag=True, help="Print every key with its default and its meaning instead.")
def show_command(file: str | None, *, as_json: bool, defaults: bool) -> None:
    """Show the values in force. There are no secrets among them: those are in files that are only named."""
    from lazyfs.config import document  # noqa: PLC0415 - check needs none of it

    if defaults and not as_json:
        print(document.sample())
        return
    found = config.Config() if defaults else config.load(file)
    if as_json:
        print(json.dumps(document.effective_json(found), indent=2))
    else:
        print(f"# {found.file or f'{config.DEFAULT_FILE} is not there'}\n{document.effective(found)}")
