"""
`lazyfs cache fetch|pin|unpin`: have all of an image in the cache, and keep it there. Thin; the work is in
lazyfs.node.fetching and lazyfs.node.pinning.

Layer: cli. Asks the worker that owns the directory, or, where none does, owns it for the time that it takes. A worker
that is replaced meanwhile is waited for: it goes on with what its predecessor was asked for.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.cacheowner import ask_owner
from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import Progress, format_bytes, make_progress, note, print_json
from lazyfs.errors import CacheOwnedError, UsageError

if TYPE_CHECKING:
    from lazyfs.node.order import MountOrder
    from lazyfs.registry import RegistryOptions

_REQUEST_S = 20.0
_OWNER_S = 60.0                  # for a worker that is being replaced
_POLL_S = 0.3
_FETCH_EPILOG = """\b
Examples:
  lazyfs cache fetch registry.example/app:lazy              all of it; returns when it is there
  lazyfs cache fetch registry.example/app:lazy --pin        and it is never evicted
  lazyfs cache fetch registry.example/app:lazy --rate 20MiB --no-wait

\b
Reads of running containers go first. What has come stays, whenever it is interrupted (^C); run it again to go on.
"""
_PIN_EPILOG = """\b
Examples:
  lazyfs cache pin registry.example/app:lazy        by the name it was mounted or fetched by (see lazyfs cache ls)
  lazyfs cache pin sha256:3f1c09aa27b1...           by its bootstrap's digest
  lazyfs cache unpin registry.example/app:lazy
"""
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("fetch", epilog=_FETCH_EPILOG, short_help="Get all of an image into the cache.")
@click.argument("image")
@click.option("--rate", metavar="SIZE", help="Fetch no more than this a second: 20MiB.  [default: no bound]")
@click.option("--pin", is_flag=True, help="Never evict it, until lazyfs cache unpin.")
@click.option("--wait/--no-wait", default=True, help="Return when all is there, or at once: the daemon goes on.")
@_json_option
@platform_option
@registry_options
@click.pass_obj
def fetch_command(
    path: Path, image: str, *, rate: str | None, pin: bool, wait: bool, as_json: bool, platform: str | None,
    registry: RegistryOptions,
) -> None:
    """
    Fetch all of a lazy image, mounted or not, so that a later start needs no data from the network.

    IMAGE is written as for mount. The daemon does it, if it runs on this cache directory.
    """
    from lazyfs.cli.cache_scrub import parse_rate  # noqa: PLC0415
    from lazyfs.cli.mount import absolute_image, registry_fields  # noqa: PLC0415
    from lazyfs.node.order import MountOrder  # noqa: PLC0415

    order = MountOrder(absolute_image(image, str(Path.cwd())), target="/", platform=platform,   # no mount: no target
                       registry=registry_fields(registry))
    with make_progress(quiet=as_json) as progress:
        shown = _Shown(progress, image)
        try:
            found = _directly(path, order, parse_rate(rate), pin=pin, wait=wait, shown=shown)
        except CacheOwnedError as owned:
            found = _by_owner(path, order, parse_rate(rate), pin=pin, wait=wait, shown=shown, owned=owned)
        if found["state"] == "complete":
            shown.finish(found)
    if as_json:
        print_json({"image": image, "bootstrap": found["bootstrap"], "state": found["state"],
                    "totalBytes": found["total_bytes"], "presentBytes": found["present_bytes"], "pinned": pin})


@click.command("pin", epilog=_PIN_EPILOG, short_help="Never evict an image.")
@click.argument("name", metavar="IMAGE|DIGEST")
@_json_option
@click.pass_obj
def pin_command(path: Path, name: str, *, as_json: bool) -> None:
    """Keep an image in the cache, however long nobody uses it and however full the cache is."""
    _set_pin(path, name, pinned=True, as_json=as_json)


@click.command("unpin", epilog=_PIN_EPILOG, short_help="Allow an image to be evicted again.")
@click.argument("name", metavar="IMAGE|DIGEST")
@_json_option
@click.pass_obj
def unpin_command(path: Path, name: str, *, as_json: bool) -> None:
    """Let an image go when room is needed, as others."""
    _set_pin(path, name, pinned=False, as_json=as_json)


class _Shown:
    """One bar, once it is known how much there is."""

    def __init__(self, progress: Progress, image: str) -> None:
        self._progress = progress
        self._image = image
        self._known = False
        self._shown_bytes = 0

    def show(self, found: dict[str, Any]) -> None:
        if found["total_bytes"] and not self._known:
            self._known = True
            self._progress.start("fetch", self._image, found["total_bytes"])
        if self._known and found["present_bytes"] > self._shown_bytes:
            self._progress.advance("fetch", found["present_bytes"] - self._shown_bytes)
            self._shown_bytes = found["present_bytes"]

    def finish(self, found: dict[str, Any]) -> None:
        self.show(found)
        self._progress.finish("fetch", f"{self._image}: all of it is here, {format_bytes(found['total_bytes'])} "
                                       f"compressed, {found['bootstrap'][:19]}")


def _directly(path: Path, order: MountOrder, rate: int, *, pin: bool, wait: bool, shown: _Shown) -> dict[str, Any]:
    from lazyfs import config  # noqa: PLC0415
    from lazyfs.node.fetching import fetch_directly  # noqa: PLC0415
    from lazyfs.node.verifying import set_node_verify  # noqa: PLC0415

    if not wait and ask_owner(path, "health", _REQUEST_S) is None:
        raise UsageError("--no-wait: no daemon runs on this cache directory, so nobody would go on",
                         hint="start one (lazyfs daemon), or wait")
    set_node_verify(config.load().verify)
    return fetch_directly(path, order, rate, pin=pin, progress=shown.show)


def _by_owner(path: Path, order: MountOrder, rate: int, *, pin: bool, wait: bool, shown: _Shown,
              owned: CacheOwnedError) -> dict[str, Any]:
    """Raises LazyfsError: it cannot be had, or `owned`: the owner is no worker, or does not answer."""
    from lazyfs.fs.isolate import error_from  # noqa: PLC0415
    from lazyfs.node.protocol import COPIES, FETCH  # noqa: PLC0415

    found = None
    deadline = time.monotonic() + _OWNER_S
    try:
        while True:
            if found is None:
                found = ask_owner(path, FETCH, _REQUEST_S, order=order.to_json(), rate=rate, pin=pin)
            else:
                answer = ask_owner(path, COPIES, _REQUEST_S)
                fetches = [] if answer is None else answer["fetches"]
                found = next((one for one in reversed(fetches) if one["image"] == order.image), None)
            if found is not None:
                deadline = time.monotonic() + _OWNER_S
                if found["error"] is not None:
                    raise error_from(found["error"])
                shown.show(found)
                if found["state"] == "complete" or not wait:
                    return found
            elif time.monotonic() > deadline:
                raise owned
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        with contextlib.suppress(Exception):   # a worker that does not answer is no reason not to end
            ask_owner(path, FETCH, _REQUEST_S, image=order.image, stop=True)
        raise


def _set_pin(path: Path, name: str, *, pinned: bool, as_json: bool) -> None:
    from lazyfs.cli.cache import check_cache  # noqa: PLC0415
    from lazyfs.node.pinning import set_unserved  # noqa: PLC0415
    from lazyfs.node.protocol import PIN  # noqa: PLC0415

    check_cache(path)
    try:
        answer = set_unserved(path, name, pinned=pinned)
    except CacheOwnedError as owned:
        asked = ask_owner(path, PIN, _REQUEST_S, name=name, pinned=pinned)
        if asked is None:
            raise owned from None
        answer = asked
    if as_json:
        print_json(answer)
        return
    verb = "pinned" if pinned else "unpinned"
    for image in answer["images"]:
        click.echo(f"{verb} {image['image'] or '(name unknown)'}  {image['bootstrap'][:19]}")
    if not answer["changed"]:
        note(f"it was {'pinned' if pinned else 'not pinned'} before")
