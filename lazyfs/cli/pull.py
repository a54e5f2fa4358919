"""
`lazyfs pull`: an image into containerd. Thin; the work is in snapshotter.pull.

Light imports only, the rest inside the function: the start of a container waits for this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lazyfs import config
from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import format_bytes, make_progress, note, print_json

if TYPE_CHECKING:
    from lazyfs.registry import RegistryOptions
    from snapshotter.pull import PullReport

_EPILOG = """\b
Examples:
  lazyfs pull registry.example/app:lazy
  lazyfs pull registry.example/app:lazy --namespace k8s.io
  lazyfs pull registry.example/app:1 --snapshotter overlayfs

\b
Then: ctr run --rm --snapshotter lazyfs registry.example/app:lazy NAME
Pulling again is quick. A pull that was killed leaves nothing behind for longer than a day.
"""


@click.command("pull", epilog=_EPILOG, short_help="Pull an image into containerd, lazily.")
@click.argument("image")
@click.option("--namespace", "-n", default="default", show_default=True, envvar="CONTAINERD_NAMESPACE", metavar="NAME",
              help="containerd's namespace; Kubernetes uses k8s.io.")
@click.option("--snapshotter", default="lazyfs", show_default=True, envvar="CONTAINERD_SNAPSHOTTER", metavar="NAME",
              help="Who unpacks it; lazy images need lazyfs.")
@click.option("--containerd-address", envvar="CONTAINERD_ADDRESS", metavar="SOCKET",
              show_default="configured, or /run/containerd/containerd.sock", help="containerd's socket.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, with the time of each phase.")
@platform_option
@registry_options
def pull_command(image: str, *, namespace: str, snapshotter: str, containerd_address: str | None,
                 quiet: bool, as_json: bool, platform: str | None, registry: RegistryOptions) -> None:
    """
    Pull an image into containerd, and unpack it with the lazyfs snapshotter.

    Of a lazy image only a few small blobs are fetched; its data comes when a container reads it. Any other image is
    pulled as by ctr. IMAGE is a reference: HOST/REPOSITORY[:TAG][@DIGEST].
    """
    from dataclasses import asdict  # noqa: PLC0415

    from snapshotter.pull import PullOrder, pull  # noqa: PLC0415 - start-up time of --help

    settings = config.load()
    address = containerd_address or settings.snapshotter.containerd_address
    order = PullOrder(image, registry, address, namespace, snapshotter, platform)
    with make_progress(quiet=quiet or as_json) as progress:
        report = pull(order, progress)
    if as_json:
        print_json(asdict(report))
    elif not quiet:
        kind = "lazy image, " if report.is_lazy else ""
        note(f"{report.name}: {kind}{format_bytes(report.fetched_bytes)} of {format_bytes(report.image_bytes)} fetched "
             f"in {sum(report.seconds.values()):.1f} s")
    if report.is_lazy and not quiet:
        _tell_what_the_node_lacks(report, registry, settings)


def _tell_what_the_node_lacks(report: PullReport, registry: RegistryOptions, settings: config.Config) -> None:
    """The daemon fetches the data, much later, and by its own configuration: say now what would fail then."""
    from lazyfs.registry.fields import from_config  # noqa: PLC0415
    from lazyfs.registry.forhost import missing_settings  # noqa: PLC0415

    host = report.name.partition("/")[0]
    missing = missing_settings(registry, from_config(settings.registry), host)
    if missing:
        note(f"note: the daemon fetches what containers read, and its configuration lacks {', '.join(missing)}: put it "
             f'below [registry.host."{host}"] in {settings.file or config.DEFAULT_FILE}, then: lazyfs daemon upgrade')
