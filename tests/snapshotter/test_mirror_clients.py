"""Real clients pull through the mirror that `lazyfs mirror install` told them of: containerd, skopeo, Podman."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from lazyfs.image.digest import Digest
from tests.containerdkit import VERSIONS, running_containerd
from tests.faultproxy import FaultProxy
from tests.mirrorkit import PushedImage, RunningMirror, image_of, push, running_mirror
from tests.mountkit import LAZYFS
from tests.registrykit import Registry, running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    """The registry, as everybody sees it: who asks it is seen."""
    with FaultProxy(registry.host) as found:
        yield found


def an_image(host: str, repository: str) -> PushedImage:
    tars = [TarBuilder().directory("d").file(f"d/{name}", os.urandom(size), mode=0o644).build()
            for name, size in (("a", 6_000_000), ("b", 1000))]
    image = image_of(tars)
    push(host, repository, "1", image)
    return image


def install(mirror: RunningMirror, *words: str | Path) -> None:
    environment = {**os.environ, "LAZYFS_CONFIG": str(mirror.config)}
    done = subprocess.run([*LAZYFS, "mirror", *map(str, words)], env=environment, capture_output=True, text=True,
                          check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def agents(proxy: FaultProxy, path: str) -> set[str]:
    """Who asked the registry for what has this in its path."""
    return {one.headers.get("user-agent", "").partition("/")[0] for one in proxy.seen("GET", path)}


@pytest.mark.parametrize("version", VERSIONS)
def test_containerd(registry: Registry, proxy: FaultProxy, tmp_path: Path, version: str) -> None:
    image = an_image(registry.host, f"c{version[0]}")
    name = f"{proxy.host}/c{version[0]}:1"
    certs = tmp_path / "certs.d"
    with running_containerd(tmp_path, version) as containerd, running_mirror(
            tmp_path, mirror={"containerd_root": str(containerd.root)}) as mirror:
        install(mirror, "install", "--config-path", certs)
        containerd.ctr("images", "pull", "--plain-http", "--hosts-dir", certs, name)
        assert agents(proxy, "/blobs/") == {"lazyfs-mirror"}
        assert agents(proxy, "/manifests/") == {"lazyfs-mirror"}
        assert image.digest in containerd.ctr("images", "list")
        assert mirror.figure('lazyfs_mirror_sent_bytes_total{end="blobs",source="registry"}') >= 6_000_000

        # Another client of this node gets what is in containerd's store, without a second copy of it.
        digest = Digest.of(image.blobs[1])
        assert mirror.get(f"/v2/c{version[0]}/blobs/{digest}", ns=proxy.host).body == image.blobs[1]
        assert mirror.figure('lazyfs_mirror_requests_total{end="blobs",source="content",status="200"}') == 1

        # The registry is gone; an image that was pulled once can be pulled again.
        containerd.ctr("images", "remove", "--sync", name)
        proxy.down()
        containerd.ctr("images", "pull", "--plain-http", "--hosts-dir", certs, name)
        containerd.ctr("images", "remove", "--sync", name)
        proxy.up()

        # The mirror is gone: the registry itself.
        mirror.stop()
        proxy.forget()
        containerd.ctr("images", "pull", "--plain-http", "--hosts-dir", certs, name)
        assert "lazyfs-mirror" not in agents(proxy, "/blobs/")
        containerd.ctr("images", "remove", "--sync", name)
        install(mirror, "uninstall")
        assert not certs.exists()


@pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed (apt-get install skopeo)")
def test_skopeo(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    image = an_image(registry.host, "skopeo")
    with running_mirror(tmp_path) as mirror:
        place = f"{mirror.host}/{proxy.host.replace(':', '__')}/skopeo"
        subprocess.run(["skopeo", "copy", "-q", "--insecure-policy", "--preserve-digests", "--src-tls-verify=false",
                        f"docker://{place}:1", f"oci:{tmp_path}/o:1"], check=True, timeout=120)
        for blob in [*image.blobs, image.data]:
            assert (tmp_path / "o/blobs/sha256" / Digest.of(blob).hex).read_bytes() == blob
        assert agents(proxy, "/blobs/") == {"lazyfs-mirror"}
        listed = subprocess.run(["skopeo", "list-tags", "--tls-verify=false", f"docker://{place}"], check=True,
                                timeout=60, capture_output=True, text=True)
        assert '"1"' in listed.stdout


@pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed (apt-get install podman)")
def test_podman(registry: Registry, proxy: FaultProxy, tmp_path: Path) -> None:
    image = an_image(registry.host, "podman")
    containers = tmp_path / "containers"
    with running_mirror(tmp_path) as mirror:
        install(mirror, "install", "--podman", "--registry", proxy.host, "--containers-config", containers)
        environment = {**os.environ, "CONTAINERS_REGISTRIES_CONF":
                       str(containers / "registries.conf.d/50-lazyfs-mirror.conf")}
        podman = ["podman", "--root", str(tmp_path / "r"), "--runroot", str(tmp_path / "rr"), "--storage-driver", "vfs"]
        policy = tmp_path / "policy.json"
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        done = subprocess.run([*podman, "pull", "-q", "--tls-verify=false", "--signature-policy", str(policy),
                               f"{proxy.host}/podman:1"], env=environment, check=False, timeout=300,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + mirror.log[-2000:]
        assert agents(proxy, "/blobs/") == {"lazyfs-mirror"}
        listed = subprocess.run([*podman, "images", "--digests", "--format", "{{.Digest}}"], check=True, timeout=60,
                                capture_output=True, text=True)
        assert image.digest in listed.stdout
        install(mirror, "uninstall")
        assert not containers.exists()
