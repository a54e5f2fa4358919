"""
`lazyfs cache scrub`: look through cached data for damage. Thin; the work is in lazyfs.cache.scrub.

Layer: cli. It asks the worker that owns the directory, piece by piece, or, where none does, owns it for a moment. A
worker that is replaced meanwhile is waited for: pieces have no state.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.cacheowner import ask_owner
from lazyfs.cli.output import Progress, format_bytes, make_progress, note, print_json
from lazyfs.errors import CacheOwnedError, ChunkDamagedError, NotFoundError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from lazyfs.cache.inventory import Inventory

    Look = Callable[[str, int], dict[str, Any]]    # (hex of a device, first chunk) -> cache.scrub.Piece as JSON

_PIECE_S = 120.0                 # a piece takes about a second; a disk that fails may take long for a sector
_OWNER_S = 30.0                  # for a worker that is being replaced
_RETRY_S = 0.2
_EPILOG = """\b
Examples:
  lazyfs cache scrub                           all that is cached, as fast as the idle disk gives
  lazyfs cache scrub registry/app:lazy         one image, by the name it was mounted by (see ls)
  lazyfs cache scrub --rate 50MiB sha256:...   a bootstrap's or device's digest; no more than that a second

\b
Exit codes:
  0   all cached data is as it was stored
  51  damaged chunks were found; they are gone, and fetched again when they are read
"""


@dataclass(slots=True)
class _Found:
    """Over all devices."""

    checked_bytes: int = 0
    device_count: int = 0
    damaged: list[dict[str, Any]] = field(default_factory=list)


@click.command("scrub", epilog=_EPILOG, short_help="Look for damage in what is cached.")
@click.argument("name", metavar="[IMAGE|DIGEST]", required=False)
@click.option("--rate", metavar="SIZE", help="Read no more than this a second: 50MiB.  [default: no bound]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_obj
def scrub_command(path: Path, name: str | None, *, rate: str | None, as_json: bool) -> None:
    """
    Compare cached data with its checksums.

    Reads what the disk holds, past the page cache, when nobody else uses the disk. A damaged chunk is dropped, and
    fetched again when it is read; at once if it belongs to a mounted image that the kernel reads without the daemon.
    """
    from lazyfs.cache import inventory  # noqa: PLC0415
    from lazyfs.cli.cache import check_cache  # noqa: PLC0415

    check_cache(path)
    rate_bytes = parse_rate(rate)
    found = inventory.take(path)
    devices = _devices(found, name)
    result = _Found()
    with contextlib.ExitStack() as stack:
        look = stack.enter_context(_owner_or_direct(path, rate_bytes))
        progress = stack.enter_context(make_progress(quiet=as_json))
        progress.start("scrub", "cached data", sum(found.devices[one].use.size_bytes for one in devices))
        for device in devices:
            _scrub_device(device, look, result, progress)
        progress.finish("scrub", "cached data: read")
    if as_json:
        print_json({"path": str(path), "devices": result.device_count, "checkedBytes": result.checked_bytes,
                    "damaged": result.damaged})
    else:
        for one in result.damaged:
            click.echo(f"damaged: device {one['device'][:19]} chunk {one['chunk']}")
        note(f"{result.device_count} devices, {format_bytes(result.checked_bytes)} compared, "
             f"{len(result.damaged)} damaged chunks")
    if result.damaged:
        raise ChunkDamagedError(
            f"{path}: {len(result.damaged)} of the cached chunks were damaged on the disk, and are dropped",
            hint="they are fetched again when they are read; if it goes on, check the disk (dmesg, smartctl)")


def parse_rate(text: str | None) -> int:
    """Bytes a second; 0: no bound. Raises UsageError."""
    from lazyfs.config.kinds import Size  # noqa: PLC0415

    if text is None:
        return 0
    try:
        found = Size().from_text(text)
        assert isinstance(found, int)
    except (TypeError, ValueError):
        raise UsageError(f"--rate {text!r:.40}: expected {Size().expected}") from None
    return found


def _devices(found: Inventory, name: str | None) -> list[str]:
    """Hex of the devices that are meant. Raises NotFoundError: nothing here is called so."""
    if name is None:
        return sorted(found.devices)
    devices = found.named_devices(name)
    if devices is None:
        raise NotFoundError(f"{name} is not in the cache", hint="lazyfs cache ls shows what is")
    return devices


@contextlib.contextmanager
def _owner_or_direct(path: Path, rate: int) -> Iterator[Look]:
    from lazyfs.cache.scrub import scrub_piece  # noqa: PLC0415
    from lazyfs.cache.store import CacheDir  # noqa: PLC0415

    try:
        cache = CacheDir.open(path)
    except CacheOwnedError as owned:
        yield _asking(path, rate, owned)
        return
    with cache:
        yield lambda device, first: scrub_piece(cache, device, first, rate).to_json()


def _asking(path: Path, rate: int, owned: CacheOwnedError) -> Look:
    from lazyfs.node.protocol import SCRUB  # noqa: PLC0415

    def look(device: str, first: int) -> dict[str, Any]:
        deadline = time.monotonic() + _OWNER_S
        while True:
            answer = ask_owner(path, SCRUB, _PIECE_S, device=f"sha256:{device}", first=first, rate=rate)
            if answer is not None:
                return answer
            if time.monotonic() >= deadline:
                raise owned
            time.sleep(_RETRY_S)

    return look


def _scrub_device(device: str, look: Look, result: _Found, progress: Progress) -> None:
    first, count = 0, 1
    while first < count:
        piece = look(device, first)
        first, count = piece["next"], piece["count"]
        result.checked_bytes += piece["checked_bytes"]
        result.damaged += [{"device": f"sha256:{device}", "chunk": index} for index in piece["damaged"]]
        progress.advance("scrub", piece["checked_bytes"])
    result.device_count += 1
