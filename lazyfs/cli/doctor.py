"""`lazyfs doctor`: thin; the work is in lazyfs.doctor."""

from __future__ import annotations

import json
import os
import sys

import click

from lazyfs import config
from lazyfs.errors import HostError

_EPILOG = """\b
Examples:
  lazyfs doctor                            this node: kernel, daemon, snapshotter, containerd, disk
  lazyfs doctor registry.example/app:lazy  also: that registry, its TLS, the clock, this node's credentials
  lazyfs doctor --json | jq '.[] | select(.status != "ok")'
"""


@click.command("doctor", epilog=_EPILOG)
@click.argument("image", required=False, default="")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--config", "file", metavar="FILE", help="The configuration.  [default: /etc/lazyfs/config.toml]")
@click.option("--containerd-config", metavar="FILE", default="/etc/containerd/config.toml", show_default=True,
              help="containerd's configuration.")
def doctor_command(image: str, file: str | None, containerd_config: str, *, as_json: bool) -> None:
    """Look at everything a node needs, a line each, and say what to do. Exit code 0: nothing has failed."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from lazyfs.doctor import Status, Subject, examine  # noqa: PLC0415 - start-up time of --help

    found, problems = config.check(file)
    bad = bool(problems)
    lines = [{"name": "configuration", "status": "failed", "text": str(one), "hint": one.hint} for one in problems]
    if not problems:
        text = f"{found.file or 'defaults'}, {len(found.origins)} keys are set"
        lines.append({"name": "configuration", "status": "ok", "text": text, "hint": ""})
    if not as_json:
        for line in lines:
            hint = f" → {line['hint']}" if line["hint"] else ""
            print(f"{line['status']:<8} {line['name']}: {line['text']}{hint}")
    for result in examine(Subject(found, image, containerd_config)):
        bad = bad or result.status is Status.FAILED
        lines.append(result.to_json())
        if not as_json:
            print(_printable(str(result)), flush=True)
    if as_json:
        print(json.dumps(lines, indent=2))
    sys.exit(HostError.exit_code if bad else 0)


def _printable(text: str) -> str:
    """Names from registries may hold terminal codes."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
