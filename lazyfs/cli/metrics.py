"""
`lazyfs metrics`: the page of metrics of this node, for where nothing may listen; thin over lazyfs.node.metrics.

Layer: cli. The same metrics are served at /metrics of daemon.health_address.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.errors import TargetError, UsageError

if TYPE_CHECKING:
    from lazyfs.cli.workers import Answer

_EPILOG = """\b
Examples:
  lazyfs metrics
  lazyfs metrics --output /var/lib/prometheus/node-exporter/lazyfs.prom   (a timer's job; node-exporter's textfile)
"""


@click.command("metrics", epilog=_EPILOG, short_help="Print this node's metrics, as Prometheus reads them.")
@click.option("--output", metavar="FILE", default="-", show_default="standard output",
              help="Write there, whole or not at all; readable for all.")
def metrics_command(output: str) -> None:
    """
    Print the metrics of this node in Prometheus' text format.

    Of the daemon; without one, of the worker of `lazyfs mount`, if there is only one. A daemon whose worker does not
    answer has `lazyfs_ready 0`, and little else. docs/observability.md says what they mean.
    """
    from lazyfs.cli.workers import ask_all  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.metrics import page  # noqa: PLC0415
    from lazyfs.node.protocol import STATUS  # noqa: PLC0415

    data = page(_snapshot(ask_all(STATUS)))
    if output == "-":
        sys.stdout.write(data.decode())
    else:
        _replace(Path(output), data)


def _snapshot(answers: list[Answer]) -> dict[str, Any]:
    """Raises TargetError: there is none, or which is not said."""
    daemon = [one for one in answers if one.daemon]
    if not daemon and len(answers) != 1:
        if not answers:
            raise TargetError("no daemon runs on this node, and nothing is mounted", hint="start it: lazyfs daemon")
        raise TargetError(f"no daemon runs on this node, and {len(answers)} workers have no common metrics",
                          hint="lazyfs status shows each of them")
    found = (daemon or answers)[0].found
    return {"ready": False} if found is None else found


def _replace(path: Path, data: bytes) -> None:
    """Node-exporter never reads half a file."""
    if path.is_dir():
        raise UsageError(f"--output {path}: expected a file, found a directory")
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
