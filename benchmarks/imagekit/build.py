"""
Make an image by its recipe: mmdebstrap for the base, then one overlayfs upper directory a layer.

Everything that mounts runs in a mount and PID namespace of its own (`unshare --kill-child`): when a step ends, fails,
or we are killed, its processes and mounts are gone with the namespace, and nothing of it is ever seen outside.
apt runs on this machine's side with `DPkg::Chroot-Directory`, so neither the mirror's name, nor its keys or
credentials, get into the image.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.imagekit import apt
from benchmarks.imagekit.layer import write_layer
from benchmarks.imagekit.layout import Layer, LayoutWriter
from benchmarks.kit.proc import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.imagekit.recipe import Recipe, Step

TAG = "latest"
_KEY_FILE = "lazyfs-recipe"  # beside oci-layout: which recipe the cached image was made by
# setpriv: the namespace also goes when we are killed by SIGKILL
_UNSHARE = [
    *("setpriv", "--pdeathsig", "KILL", "--"),
    *("unshare", "--mount", "--propagation", "slave", "--pid", "--fork", "--kill-child", "--mount-proc"),
]
_BASE_TIMEOUT_S = 900.0
_ENV = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}

# Mounts ROOT; `install` downloads with this machine's apt and unpacks with the image's dpkg.
_PRELUDE = r"""
set -euo pipefail
options=redirect_dir=off,metacopy=off
mount -t overlay overlay -o "lowerdir=$LOWER,upperdir=$UPPER,workdir=$OVERLAY_WORK,$options" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --bind /dev "$ROOT/dev"
install() {
    mount --bind "$ARCHIVES" "$ROOT/var/cache/apt/archives"
    # invoke-rc.d asks it: no service may start in the image's root. Gone again below, so no trace in the layer.
    printf '#!/bin/sh\nexit 101\n' >"$ROOT/usr/sbin/policy-rc.d"
    chmod 755 "$ROOT/usr/sbin/policy-rc.d"
    [ -n "$(ls "$LISTS" | grep -v -x -e lock -e partial)" ] || apt-get -qq update
    apt-get -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends install "$@"
    rm "$ROOT/usr/sbin/policy-rc.d"
    umount "$ROOT/var/cache/apt/archives"
}
"""

_APT_CONF = """
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "{sources}";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Dir::State "{root}/var/lib/apt";
Dir::State::Lists "{lists}";
Dir::State::status "{root}/var/lib/dpkg/status";
Dir::Cache "{cache}";
Dir::Cache::archives "{root}/var/cache/apt/archives";
Dir::Log "{cache}";
DPkg::Chroot-Directory "{root}";
APT::Sandbox::User "root";
"""


def cached(recipe: Recipe, folder: Path) -> Path | None:
    """The image's OCI layout if it was made before, by this very recipe."""
    layout = folder / recipe.name
    key = layout / _KEY_FILE
    return layout if key.is_file() and key.read_text() == recipe.key else None


def build(recipe: Recipe, folder: Path, say: Callable[[str], None] = print) -> Path:
    """
    Return the OCI layout `folder/NAME` (tag `latest`), made now if it is not there yet.

    Made in a temporary directory beside it and renamed at the end: it is there whole or not at all.

    Raises:
        ToolError: a tool failed; its last lines are in the message.

    """
    done = cached(recipe, folder)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    work = Path(tempfile.mkdtemp(prefix=f".{recipe.name}-{os.getpid()}-", dir=folder))
    try:
        out = work / "layout"
        _Builder(recipe, work, say).make(out)
        (out / _KEY_FILE).write_text(recipe.key)
        layout = folder / recipe.name
        shutil.rmtree(layout, ignore_errors=True)
        out.rename(layout)
    finally:
        shutil.rmtree(work)
    return layout


def _sweep(folder: Path) -> None:
    """Take away what builds that were killed have left."""
    for path in folder.glob(".*"):
        found = re.fullmatch(r"\.[a-z]+-(\d+)-\w+", path.name)
        if found and not Path("/proc", found[1]).exists():
            shutil.rmtree(path)


class _Builder:
    """The working directory of one build."""

    def __init__(self, recipe: Recipe, work: Path, say: Callable[[str], None]) -> None:
        self._recipe, self._work, self._say = recipe, work, say
        self._lower: list[Path] = []  # lowest first
        self._apt_conf = work / "apt.conf"
        for name in ("root", "lists/partial", "cache", "archives/partial"):
            (work / name).mkdir(parents=True)

    def make(self, out: Path) -> None:
        writer = LayoutWriter(out)
        jobs: list[Future[Layer]] = []
        # A finished layer is compressed while the next one is installed.
        pool = ThreadPoolExecutor(os.cpu_count() or 1)
        try:
            self._configure_apt()
            self._base()
            jobs.append(self._pack(pool, writer, "mmdebstrap --variant=minbase"))
            for step in self._recipe.steps:
                self._say(f"  {step.comment}")
                self._step(step)
                jobs.append(self._pack(pool, writer, step.comment))
            self._say("  compressing the layers")
            layers = [job.result() for job in jobs]
        except BaseException:
            writer.abort()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        writer.finish(layers, tag=TAG, command=list(self._recipe.command), env=list(self._recipe.env))

    def _pack(self, pool: ThreadPoolExecutor, writer: LayoutWriter, comment: str) -> Future[Layer]:
        top = self._lower[-1]

        def fill(sink: IO[bytes]) -> int:
            return write_layer(top, sink)

        return pool.submit(writer.add_layer, comment, fill)

    def _configure_apt(self) -> None:
        # the name's ending tells apt and mmdebstrap that it is in deb822 syntax
        sources = self._work / "debian.sources"
        text = apt.sources(apt.codename())
        host_options = self._work / "host.conf"
        for path in (sources, self._apt_conf, host_options):
            path.touch(mode=0o600)  # a mirror's or a proxy's address may hold a secret
        sources.write_text(text)
        host_options.write_text(apt.options())
        paths = {name: self._work / name for name in ("root", "lists", "cache")}
        self._apt_conf.write_text(host_options.read_text() + _APT_CONF.format(sources=sources, **paths))

    def _base(self) -> None:
        self._say("  mmdebstrap (minimal Debian)")
        top = self._work / "layer-0"
        run(
            [
                *_UNSHARE, "mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory", "--quiet",
                f"--aptopt={self._work / 'host.conf'}", apt.codename(), top, self._work / "debian.sources",
            ],
            timeout_s=_BASE_TIMEOUT_S,
            env={**_ENV, "TMPDIR": str(self._work)},
        )  # fmt: skip
        # what mmdebstrap takes over from this machine has no place in an image
        apt_etc = top / "etc" / "apt"
        own = [apt_etc / "sources.list", apt_etc / "apt.conf.d" / "99mmdebstrap", top / "etc/hostname"]
        for path in [*own, top / "etc/resolv.conf", *(apt_etc / "sources.list.d").iterdir()]:
            path.unlink(missing_ok=True)
        self._lower.append(top)

    def _step(self, step: Step) -> None:
        upper = self._work / f"layer-{len(self._lower)}"
        overlay_work = self._work / f"overlay-{len(self._lower)}"
        upper.mkdir(mode=0o755)
        overlay_work.mkdir()
        run(
            [*_UNSHARE, "bash", "-c", _PRELUDE + step.script],
            timeout_s=step.timeout_s,
            env={
                **_ENV,
                "LOWER": ":".join(str(path) for path in reversed(self._lower)),
                "UPPER": str(upper),
                "OVERLAY_WORK": str(overlay_work),
                "ROOT": str(self._work / "root"),
                "LISTS": str(self._work / "lists"),
                "ARCHIVES": str(self._work / "archives"),
                "APT_CONFIG": str(self._apt_conf),
                "PIP": str(Path(sys.executable).with_name("pip")),
                "PYTHON_VERSION": f"{sys.version_info.major}.{sys.version_info.minor}",
            },
        )
        self._lower.append(upper)
