"""
`lazyfs cache ls|gc|rm`: what the cache holds, and making room in it. Thin; the work is in lazyfs.node.housekeeping.
scrub: cli.cache_scrub; fetch, pin, unpin: cli.cache_fetch.

Looking needs nobody: the directory is read as it is. What removes asks the worker that owns the directory, or, where
none does, owns it for a moment.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.cache_copies import ask_copies, copy_words
from lazyfs.cli.cache_fetch import fetch_command, pin_command, unpin_command
from lazyfs.cli.cache_scrub import scrub_command
from lazyfs.cli.cacheowner import ask_owner
from lazyfs.cli.output import format_bytes, note, print_json
from lazyfs.errors import CacheOwnedError, HostError, UsageError

if TYPE_CHECKING:
    from lazyfs.cache.inventory import Inventory
    from lazyfs.cache.space import Limits
    from lazyfs.node.housekeeping import Request

_EVICT_S = 600.0                 # deleting terabytes takes a while
_WIDTH_COLUMNS = 200
_EPILOG = """\b
Examples:
  lazyfs cache ls                        images and layer devices, last used first
  lazyfs cache gc                        down to the configured quota and floor, as the daemon does by itself
  lazyfs cache gc --quota 20GiB          down to 20 GiB now
  lazyfs cache gc --all --dry-run        what would go if all went that is not mounted
  lazyfs cache rm registry/app:lazy      one image, but for layers that others here have
  lazyfs cache fetch registry/app:lazy   all of an image, mounted or not
  lazyfs cache pin registry/app:lazy     never evict it
  lazyfs cache scrub                     compare what is cached with its checksums
"""
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would go.")


@click.group("cache", epilog=_EPILOG, short_help="Show what is cached; make room.")
@click.option("--cache-dir", metavar="DIR", show_default="the configured one", help="Which cache.")
@click.pass_context
def cache_command(context: click.Context, cache_dir: str | None) -> None:
    """Show what is cached on this node, and make room."""
    if cache_dir == "":
        raise UsageError("--cache-dir: expected a directory, found nothing")
    if cache_dir is None:
        from lazyfs import config  # noqa: PLC0415

        cache_dir = config.load().daemon.cache_dir
    context.obj = Path(cache_dir).resolve()


@cache_command.command("ls")
@_json_option
@click.pass_obj
def ls_command(path: Path, *, as_json: bool) -> None:
    """
    Show images and layer devices.

    Size on disk, how much of them is there, what becomes of the rest, last use, who uses them.
    """
    from lazyfs.cache import inventory  # noqa: PLC0415

    check_cache(path)
    described = _describe(path, inventory.take(path))
    if as_json:
        print_json(described)
    else:
        _print_table(described)


@cache_command.command("gc")
@click.option("--quota", metavar="SIZE", show_default="configured", help="Keep at most this: 20GiB; 0: no quota.")
@click.option("--floor", metavar="SIZE|%", show_default="configured", help="Leave so much of the disk free: 50GiB, 5%.")
@click.option("--all", "everything", is_flag=True, help="Evict all that is not in use.")
@_dry_run_option
@_json_option
@click.pass_obj
def gc_command(path: Path, *, quota: str | None, floor: str | None, everything: bool, dry_run: bool,
               as_json: bool) -> None:
    """Evict what was not used for longest, down to quota and floor. Never what is mounted or being read."""
    from lazyfs.node.housekeeping import Request  # noqa: PLC0415

    if everything and (quota or floor):
        raise UsageError("--all goes without --quota and --floor")
    request = Request(_limits(quota, floor), everything, dry_run=dry_run)
    _report(_evict(path, request), dry_run=dry_run, as_json=as_json)


@cache_command.command("rm")
@click.argument("name", metavar="IMAGE|DIGEST")
@_dry_run_option
@_json_option
@click.pass_obj
def rm_command(path: Path, name: str, *, dry_run: bool, as_json: bool) -> None:
    """
    Remove an image's data from the cache; refused while it is mounted.

    IMAGE is the name by which it was mounted last (see ls), DIGEST its bootstrap's, or a layer device's. Layers that
    another image in the cache has stay.
    """
    from lazyfs.node.housekeeping import Request  # noqa: PLC0415

    _report(_evict(path, Request(remove=name, dry_run=dry_run)), dry_run=dry_run, as_json=as_json)


for _command in (scrub_command, fetch_command, pin_command, unpin_command):
    cache_command.add_command(_command)


def check_cache(path: Path) -> None:
    """Raises UsageError, HostError: there is no cache that we may look at; none is made then."""
    try:
        if not path.is_dir():
            raise UsageError(f"{path}: there is no cache", hint="name its directory with --cache-dir")
        next(path.iterdir(), None)
    except PermissionError:
        raise HostError(f"{path} is private to its user", hint="run it with sudo") from None


def _limits(quota: str | None, floor: str | None) -> Limits | None:
    """What the options say, on top of what is configured; None: nothing."""
    from lazyfs import config  # noqa: PLC0415
    from lazyfs.cache.space import Limits  # noqa: PLC0415
    from lazyfs.config.kinds import Size  # noqa: PLC0415

    if quota is None and floor is None:
        return None
    known = config.load().cache
    found: dict[str, Any] = {"quota": known.quota_bytes, "floor": known.free_floor_bytes}
    for name, text, kind in (("quota", quota, Size()), ("floor", floor, Size(share=True))):
        if text is not None:
            try:
                found[name] = kind.from_text(text)
            except ValueError:
                raise UsageError(f"--{name} {text!r:.40}: expected {kind.expected}") from None
    return Limits(found["quota"], found["floor"])


def _evict(path: Path, request: Request) -> dict[str, Any]:
    """By the worker that owns the directory; else directly."""
    from lazyfs.node.housekeeping import evict_unserved  # noqa: PLC0415
    from lazyfs.node.protocol import EVICT  # noqa: PLC0415

    check_cache(path)
    try:
        return evict_unserved(path, request)
    except CacheOwnedError as owned:
        answer = ask_owner(path, EVICT, _EVICT_S, **request.to_json())
        if answer is None:
            raise owned from None
        return answer


def _report(answer: dict[str, Any], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"dry_run": dry_run, **answer})
        return
    verb = "would remove" if dry_run else "removed"
    for image in answer["images"]:
        click.echo(f"{verb} image  {image['image'] or '(name unknown)'}  {image['bootstrap'][:19]}")
    for device in answer["devices"]:
        click.echo(f"{verb} device {device[:19]}")
    free = "would be free" if dry_run else "freed"
    note(f"{answer['device_count']} layer devices, {answer['image_count']} images: "
         f"{format_bytes(answer['freed_bytes'])} {free}, {format_bytes(answer['used_bytes'])} left")
    if answer["freed_bytes"] < answer["wanted_bytes"]:
        note(f"hint: {format_bytes(answer['wanted_bytes'])} were to go; the rest is in use or pinned: lazyfs cache ls")


def _describe(path: Path, found: Inventory) -> dict[str, Any]:
    """All that `ls --json` shows. Sizes: bytes allocated; times: seconds since 1970."""
    from lazyfs.cache import inventory, pins  # noqa: PLC0415
    from lazyfs.cache.presence import read_boot_id  # noqa: PLC0415
    from lazyfs.cache.scrub import last_scrub  # noqa: PLC0415
    from lazyfs.node.housekeeping import mounts_of  # noqa: PLC0415

    mounts, boot_id = mounts_of(path), read_boot_id()
    pinned, copies = pins.pinned(path), ask_copies(path)
    users: dict[str, list[str]] = {}
    for image in found.images.values():
        for device in image.record.all_devices:
            users.setdefault(device, []).extend(mounts.get(image.name, ()))
    hot = {image.record.hot for image in found.images.values()}
    devices: list[dict[str, Any]] = [
        {"digest": f"sha256:{one.name}", "hot": one.name in hot, "bytes": one.use.size_bytes,
         "lastUse": one.last_use_ns / 1e9, "scrubbed": last_scrub(path, one.name),
         "present": inventory.present_share(path, one.name, boot_id),
         "mountedOn": sorted(set(users.get(one.name, ())))}
        for one in sorted(found.devices.values(), key=lambda one: -one.last_use_ns)
    ]
    shares = {device["digest"]: device["present"] for device in devices}
    images: list[dict[str, Any]] = []
    for image in found.images.values():
        own = [one for one in found.devices_of(image.name) if one.name != image.record.hot]
        present = [shares[f"sha256:{one.name}"] or 0.0 for one in own]
        missing = len(set(image.record.devices)) - len(own)
        images.append({
            "image": image.record.image, "bootstrap": f"sha256:{image.name}",
            "bytes": found.image_use(image.name).size_bytes,
            "devices": [f"sha256:{name}" for name in image.record.devices],
            "present": sum(present) / (len(present) + missing) if present else 0.0,
            "lastUse": image.last_use_ns / 1e9,
            "mountedOn": sorted(mounts.get(image.name, ())),
            "pinned": image.name in pinned,
            "copy": copies.get(f"sha256:{image.name}"),
        })
    images.sort(key=lambda image: -image["lastUse"])
    return {"path": str(path), "bytes": found.use.size_bytes, "inodes": found.use.inodes,
            "leftoverBytes": found.leftover_use.size_bytes, "images": images, "devices": devices}


def _print_table(described: dict[str, Any]) -> None:
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("", "digest", "size", "present", "rest", "last use", "used by"):
        table.add_column(name, justify="right" if name in {"size", "present"} else "left", no_wrap=True)
    for image in described["images"]:
        table.add_row(image["image"] or "(name unknown)", image["bootstrap"][:19], *_columns(image))
    for device in described["devices"]:
        table.add_row("  hot device" if device["hot"] else "  layer device", device["digest"][:19], *_columns(device))
    # Not cut where nobody looks at a terminal of that width (a pipe, a log).
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH_COLUMNS).print(table)
    click.echo(f"{described['path']}: {len(described['images'])} images, {len(described['devices'])} layer devices, "
               f"{format_bytes(described['bytes'])}")


def _columns(one: dict[str, Any]) -> tuple[str, ...]:
    present = "?" if one["present"] is None else f"{one['present']:.0%}"
    ago = _ago(max(0.0, time.time() - one["lastUse"])) if one["lastUse"] else "-"
    users = [*(["pinned"] if one.get("pinned") else []), *one["mountedOn"]]
    return format_bytes(one["bytes"]), present, copy_words(one.get("copy")), ago, ", ".join(users) or "-"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
