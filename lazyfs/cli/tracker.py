"""`lazyfs tracker`: serve clusters, in the foreground. Thin; the work is in lazyfs.tracker."""

from __future__ import annotations

import dataclasses
import json
import sys

import click

from lazyfs import config, logs
from lazyfs.errors import ConfigError, UsageError

_EPILOG = """\b
Examples:
  lazyfs tracker                                       on loopback, state in memory
  lazyfs tracker --address 0.0.0.0:9450 --redis redis://redis.example:6379
  curl http://127.0.0.1:9450/v1/clusters/prod          who is there, what is shared
"""
_WATCH_S = 1.0


@click.command("tracker", epilog=_EPILOG, short_help="Tell the nodes of clusters of each other.")
@click.option("--config", "file", metavar="FILE", help="Configuration; default: /etc/lazyfs/config.toml.")
@click.option("--address", metavar="HOST:PORT", help="Where to listen.  [default: configured, else 127.0.0.1:9450]")
@click.option("--redis", metavar="URL", help="Where its state is.  [default: configured, else in memory]")
@click.option("--json", "as_json", is_flag=True, help="Log lines of JSON, whatever is configured.")
def tracker_command(*, file: str | None, address: str | None, redis: str | None, as_json: bool) -> None:
    """
    Serve any number of clusters: who is in them, who shares what, who does badly (docs/tracker.md).

    Several trackers on one Redis are equal; a node is told of all of them. Prints the address when it listens.
    """
    import trio  # noqa: PLC0415 - not for --help

    from lazyfs.node import notify  # noqa: PLC0415
    from lazyfs.tracker.run import EXTENSIONS, run  # noqa: PLC0415

    found = _with(config.load(file), address, redis)
    log = dataclasses.replace(found.log, format="json") if as_json else found.log
    logs.setup(log, program="tracker")

    def started(addresses: list[str]) -> None:
        print(json.dumps({"addresses": addresses}) if as_json else f"tracker at {', '.join(addresses)}")
        sys.stdout.flush()
        notify.notify(f"READY=1\nSTATUS=tracker at {', '.join(addresses)}")

    async def stay_watched() -> None:
        """A loop that hangs is killed, and started again (WatchdogSec= of its unit)."""
        while True:
            notify.watchdog(trio.current_time())
            await trio.sleep(_WATCH_S)

    trio.run(run, found, started, (*EXTENSIONS, lambda _service, _settings: stay_watched))


def _with(found: config.Config, address: str | None, redis: str | None) -> config.Config:
    """Raises UsageError: an option is off; as its key would be."""
    given = {"LAZYFS_TRACKER_ADDRESS": address, "LAZYFS_TRACKER_REDIS": redis}
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        return found
    try:
        return config.load(found.file or None, {**_environment(), **values})
    except ConfigError as error:
        text = str(error)
        for name in values:
            text = text.replace(f"environment: {name}", f"--{name.rpartition('_')[2].lower()}")
        raise UsageError(text, hint="a password does not belong there: tracker.redis_password_file" if (
            redis and "--redis" in text) else error.hint) from None


def _environment() -> dict[str, str]:
    import os  # noqa: PLC0415 - with options only

    return dict(os.environ)
