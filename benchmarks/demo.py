"""
`scripts/demo`: one real image, started whole and started lazily over the same link.

Steps and times as they happen, then a table. Nothing is left behind but the built image in `.cache/demo`, whatever
ends it. Everything runs on this machine alone: the registry is first on loopback (to push and convert), then at the
far end of a veth pair shaped to 1 Gbit/s.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.imagekit.build import build, cached
from benchmarks.imagekit.recipe import WEB
from benchmarks.kit.container import Container
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import LazyMount, convert
from benchmarks.kit.link import Link, make_link
from benchmarks.kit.proc import ToolError, run
from benchmarks.kit.registry import start_registry
from benchmarks.kit.workspace import Interrupted, Workspace, exit_by_signal, workspace

if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "demo"
PROGRAM = ["python3", "-c", "import numpy; print('numpy', numpy.__version__)"]
_FETCH_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Start:
    """One measured start."""

    total_s: float
    link_bytes: int
    printed: str


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what is being done and, when it is done, how long it took."""
    print(f"* {text}", flush=True)
    begin = time.perf_counter()
    yield
    print(f"  done in {time.perf_counter() - begin:.1f} s", flush=True)


def start_lazily(place: Workspace, link: Link, image: str) -> Start:
    """From nothing on the node to the program's end, fetching what is read."""
    mount = LazyMount(place, image)
    container = Container(place, mount.path)
    drop_page_cache()
    before, begin = link.bytes_total(), time.perf_counter()
    mount.mount()
    printed = container.run(PROGRAM)
    result = Start(time.perf_counter() - begin, link.bytes_total() - before, printed)
    container.close()
    mount.close()
    return result


def start_whole(place: Workspace, link: Link, image: str) -> Start:
    """The same, after all layers were fetched and unpacked (skopeo copy, umoci unpack)."""
    layout, bundle = place.folder("whole-layout"), place.top / "whole-bundle"
    container = Container(place, bundle / "rootfs")
    drop_page_cache()
    before, begin = link.bytes_total(), time.perf_counter()
    run(
        ["skopeo", "copy", "--quiet", "--src-tls-verify=false", image, f"oci:{layout}:latest"],
        timeout_s=_FETCH_TIMEOUT_S,
    )
    run(["umoci", "unpack", "--image", f"{layout}:latest", bundle], timeout_s=_FETCH_TIMEOUT_S)
    printed = container.run(PROGRAM)
    result = Start(time.perf_counter() - begin, link.bytes_total() - before, printed)
    container.close()
    shutil.rmtree(bundle)
    shutil.rmtree(layout)
    return result


def demo(place: Workspace) -> None:
    """The whole demonstration. Raises ToolError."""
    found = cached(WEB, CACHE) is not None
    with step("image: " + (f"the one in {CACHE}" if found else "Debian with python3, numpy and nginx, 4 layers")):
        layout = build(WEB, CACHE, say=lambda text: print(text, flush=True))
    registry = start_registry(place)
    with step(f"push it to a registry on loopback ({registry.host})"):
        source = registry.push(layout, "demo/web")
    target = f"{source}-lazy"
    with step(f"lazyfs convert {source} {target}"):
        convert(place, source, target)
    registry.close()
    with step("put the registry behind a link of 1 Gbit/s (network namespace, veth, TBF)"):
        link = make_link(place)
        registry = start_registry(place, link=link)
    image, lazy_image = registry.reference("demo/web"), registry.reference("demo/web", "latest-lazy")
    with step(f"lazily: lazyfs mount, then `{_shown()}` in a container"):
        lazy = start_lazily(place, link, lazy_image)
    with step("whole: skopeo copy, umoci unpack, then the same program in a container"):
        whole = start_whole(place, link, image)
    if lazy.printed != whole.printed:
        raise ToolError(f"the program printed {lazy.printed!r} lazily and {whole.printed!r} from the whole image")
    print_table(lazy, whole)


def print_table(lazy: Start, whole: Start) -> None:
    """What it is all about."""
    from rich.console import Console  # noqa: PLC0415 - not needed before the end
    from rich.table import Table  # noqa: PLC0415

    table = Table(title=_shown(), caption="nothing on the node before, registry behind 1 Gbit/s", min_width=72)
    table.add_column("")
    table.add_column("to the program's end", justify="right")
    table.add_column("over the link", justify="right")
    for name, start in (("fetch and unpack everything", whole), ("lazyfs", lazy)):
        table.add_row(name, f"{start.total_s:.2f} s", f"{start.link_bytes / 1e6:.1f} MB")
    ratio = f"{lazy.total_s / whole.total_s:.2f} x", f"{lazy.link_bytes / whole.link_bytes:.2f} x"
    table.add_row("lazyfs against everything", *ratio, style="bold")
    print()
    Console().print(table)


def _shown() -> str:
    return 'python3 -c "import numpy"'


def main() -> int:
    if os.geteuid() != 0:
        print("demo: needs root (network namespace, mounts, container)", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    try:
        with workspace() as place:
            demo(place)
        print(f"All cleaned up; {time.perf_counter() - begin:.0f} s in all.")
    except ToolError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print("demo: interrupted; everything it had made is gone again", file=sys.stderr)
        exit_by_signal(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
