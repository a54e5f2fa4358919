"""
`lazyfs mount` and `lazyfs umount`: thin; the work is in lazyfs.node.

Light imports only, the rest inside functions: start-up time counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lazyfs.cli.options import platform_option, registry_options
from lazyfs.errors import HostError, LazyfsError, TargetError, UsageError

if TYPE_CHECKING:
    from lazyfs.registry import RegistryOptions

_PATH_SCHEMES = ("oci:", "oci-archive:", "docker-archive:")

_MOUNT_EPILOG = """\b
Examples:
  lazyfs mount registry.example/app:lazy /mnt/app
  lazyfs mount oci:/srv/images:app-lazy /mnt/app --driver fuse
  lazyfs mount localhost:5000/app:lazy /mnt/app --insecure --foreground
  lazyfs mount registry.example/app:lazy /mnt/app --full-copy off      only what is read is fetched

\b
All mounts of one cache directory share one background worker; it ends with the last of them. Its log and its
control socket are in /run/lazyfs/<id>/. A container gets an overlay on top:
  mount -t overlay overlay -o lowerdir=/mnt/app,upperdir=UPPER,workdir=WORK MERGED
"""
_UMOUNT_EPILOG = """\b
Examples:
  lazyfs umount /mnt/app
  lazyfs umount --lazy /mnt/app     detach now; who still uses it is served until done
  lazyfs umount --force /mnt/app    detach now; who still uses it gets errors
  lazyfs umount --stale             clean up after workers that were killed
"""


@click.command("mount", epilog=_MOUNT_EPILOG, short_help="Mount a lazy image on a directory.")
@click.argument("image")
@click.argument("directory", metavar="DIR")
@click.option("--driver", type=click.Choice(["auto", "erofs", "fuse"]), show_default="configured, or auto",
              help="erofs: the kernel serves the metadata (Linux 6.12 or newer); fuse: the worker does.")
@click.option("--foreground", is_flag=True, help="Stay until interrupted (or until it is unmounted); unmount then.")
@click.option("--cache-dir", metavar="DIR", show_default="the daemon's, or configured",
              help="Where fetched data is kept.")
@click.option("--read-timeout", type=float, show_default="configured, or 60", metavar="SECONDS",
              help="A read whose data has not come by then ends with an error.")
@click.option("--no-prefetch", is_flag=True, help="Do not fetch the image's hot blob ahead of the reads.")
@click.option("--full-copy", type=click.Choice(["off", "on", "idle"]), show_default="configured, or on",
              help="Copy all of it into the cache in the background, once it is read; idle: only while nobody reads.")
@platform_option
@registry_options
def mount_command(
    image: str, directory: str, *, driver: str | None, foreground: bool, cache_dir: str | None,
    read_timeout: float | None, no_prefetch: bool, full_copy: str | None, platform: str | None,
    registry: RegistryOptions,
) -> None:
    """
    Make a lazy image readable at DIR, an empty directory.

    Returns when DIR can be read; data is fetched when it is needed, and kept. What `lazyfs convert` wrote is a lazy
    image; IMAGE is written as for convert.
    """
    from lazyfs import config  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.launch import find_daemon, mount_image  # noqa: PLC0415 - start-up time of --help
    from lazyfs.node.order import MountOrder  # noqa: PLC0415
    from lazyfs.node.unmount import resolve_target  # noqa: PLC0415

    _require_root()
    configured = config.load().daemon
    driver = driver or configured.driver
    target = resolve_target(directory)
    _check_before(target, driver)
    order = MountOrder(
        image=absolute_image(image, str(Path.cwd())), target=target, driver=driver, platform=platform,
        prefetch=configured.prefetch and not no_prefetch,
        read_timeout_s=configured.read_timeout_s if read_timeout is None else read_timeout,
        registry=registry_fields(registry), full_copy=full_copy or "",
    )
    if cache_dir is None:
        daemon = find_daemon()
        cache_dir = configured.cache_dir if daemon is None else daemon.cache_dir
    handle = mount_image(order, os.path.realpath(cache_dir), attached=foreground)
    if foreground:
        try:
            print(f"{image} is mounted on {target} ({handle.result['driver']}); ^C unmounts it", file=sys.stderr)
            with _interrupt_ends():
                handle.wait()
        finally:
            handle.close()


@click.command("umount", epilog=_UMOUNT_EPILOG, short_help="Unmount a lazy image.")
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--lazy", is_flag=True, help="Detach it now even if it is in use; serve its users until they are done.")
@click.option("--force", is_flag=True, help="Detach it now even if it is in use; its users get errors.")
@click.option("--all", "everything", is_flag=True, help="Unmount every lazy image.")
@click.option("--stale", is_flag=True, help="Remove the mounts of workers that have died.")
def umount_command(directory: str | None, *, lazy: bool, force: bool, everything: bool, stale: bool) -> None:
    """Unmount what `lazyfs mount` mounted on DIR. Never hangs, whatever the worker or the registry does."""
    from lazyfs.node import unmount  # noqa: PLC0415
    from lazyfs.node.rundir import all_worker_dirs  # noqa: PLC0415
    from lazyfs.node.unmounting import unmount_target  # noqa: PLC0415

    if (directory is not None) + everything + stale != 1:
        raise UsageError("name a DIR, or --all, or --stale", hint="'lazyfs umount --help' shows examples")
    _require_root()
    if directory is not None:
        unmount_target(unmount.resolve_target(directory), lazy=lazy, force=force)
        return
    unmount.clean_all_stale()
    if not everything:
        return
    failures: list[LazyfsError] = []
    for target in [record.target for found in all_worker_dirs() for record in found.records()]:
        try:
            unmount_target(target, lazy=lazy, force=force)
        except LazyfsError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def absolute_image(image: str, cwd: str) -> str:
    """The reference as the worker, which has another working directory, must read it."""
    for scheme in _PATH_SCHEMES:
        rest = image.removeprefix(scheme)
        if rest != image and not rest.startswith("/"):
            return f"{scheme}{cwd.rstrip('/')}/{rest}"
    return image


def _require_root() -> None:
    if os.geteuid() != 0:
        raise HostError("mounting and unmounting need root", hint="run it with sudo")


def _check_before(target: str, driver: str) -> None:
    """What can be refused without a worker. The worker checks again."""
    from lazyfs.fs.drivers import choose_driver  # noqa: PLC0415
    from lazyfs.node.rundir import find_record  # noqa: PLC0415
    from lazyfs.node.unmount import check_target, clean_and_remove  # noqa: PLC0415

    choose_driver(driver)
    if not Path("/dev/fuse").exists():
        raise HostError("there is no /dev/fuse", hint="load it with: modprobe fuse")
    try:
        check_target(target)
    except TargetError:
        found = find_record(target)
        if found is None or found[1].worker.alive:
            raise
        clean_and_remove(found[0])   # a mount of ours whose worker died
        check_target(target)


def registry_fields(registry: RegistryOptions) -> dict[str, Any]:
    """The options as JSON; with the credentials file of *this* user and environment, not the worker's."""
    from lazyfs.registry.fields import default_auth_file, to_fields  # noqa: PLC0415

    return to_fields(replace(registry, auth_file=registry.auth_file or default_auth_file()))


@contextlib.contextmanager
def _interrupt_ends() -> Any:
    """^C and SIGTERM end the block without an error: that is how a foreground mount is meant to end."""
    previous = signal.signal(signal.SIGTERM, _raise_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt
