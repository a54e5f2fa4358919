"""lazyfs as an image of our own: built without an image registry or a network, run as the user it says, by runc."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs.registry import RegistryOptions
from tests import leaks
from tests.convertkit import Layout, Lazy, tar_of
from tests.mountkit import Machine
from tests.registrykit import running_registry
from tests.runnerkit import require_runc

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.mount, pytest.mark.timeout(600)]     # a new machine fetches packages first
ROOT = Path(__file__).resolve().parents[2]
BUILD_S = 500.0
RUN_S = 120.0
USER = 65532                     # of the Containerfile
MOST_BYTES = 120_000_000         # compressed; 81 MB when this was written


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The image, built and unpacked: a bundle of runc."""
    require_runc()
    if missing := [name for name in ("buildah", "mmdebstrap", "umoci") if shutil.which(name) is None]:
        pytest.skip(f"not installed: {missing}")
    top = tmp_path_factory.mktemp("own-image")
    environment = {name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", leaks.MARK_NAME)}
    command = [ROOT / "packaging/container/build", f"oci:{top}/image:lazyfs"]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          check=False, timeout=BUILD_S)
    assert done.returncode == 0, done.stderr
    subprocess.run(["umoci", "unpack", "--image", f"{top}/image:lazyfs", top / "bundle"], check=True, timeout=RUN_S,
                   capture_output=True)
    yield top / "bundle"
    shutil.rmtree(top)


def call(bundle: Path, *words: str, mounts: tuple[tuple[Path, str], ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the image's own entrypoint with `words`, on this machine's network; everything else as the image says."""
    path = bundle / "config.json"
    kept = path.read_text()
    config: dict[str, Any] = json.loads(kept)
    config["process"]["args"] += words
    config["process"]["terminal"] = False
    config["root"]["readonly"] = True
    config["linux"]["namespaces"] = [one for one in config["linux"]["namespaces"] if one["type"] != "network"]
    config["mounts"] = [one for one in config["mounts"] if one["destination"] not in ("/sys", "/etc/resolv.conf")]
    config["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
    config["mounts"] += [{"destination": inside, "type": "bind", "source": str(outside), "options": ["bind", "ro"]}
                         for outside, inside in mounts]
    path.write_text(json.dumps(config))
    try:
        command = ["runc", "--root", bundle.parent / "runc", "run", "--bundle", bundle, f"lazyfs-image-{os.getpid()}"]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                              timeout=RUN_S)
    finally:
        path.write_text(kept)


def test_it_converts_as_lazyfs_does_elsewhere(bundle: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    layout = Layout(tmp_path / "in")
    layout.add_image("app", [tar_of({f"data/{number}": rng.randbytes(300_000) for number in range(5)}),
                             tar_of({"etc/app": b"1" * 100_000, "data/1": b"changed"})])
    with running_registry(tmp_path / "registry") as registry:
        image = f"{registry.host}/app:lazy"
        done = call(bundle, "convert", "--json", "oci:/in:app", image, mounts=((tmp_path / "in", "/in"),))
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        Machine(tmp_path).lazyfs("convert", layout.reference("app"), f"oci:{tmp_path}/out:lazy")
        expected = Lazy(f"oci:{tmp_path}/out:lazy").document
        assert report["digest"] == expected.digest.text
        with contextlib.closing(Lazy(image, registry=RegistryOptions())) as found:
            assert found.document == expected
            assert found.verify()
        done = call(bundle, "check", image, "oci:/in:app", mounts=((tmp_path / "in", "/in"),))
        assert done.returncode == 0, done.stderr
        done = call(bundle, "inspect", f"{registry.host}/app:none")
        assert done.returncode == 21, done.stderr


def test_it_is_small_and_nobody_in_it_is_root(bundle: Path) -> None:
    config = json.loads((bundle / "config.json").read_text())
    assert config["process"]["user"]["uid"] == config["process"]["user"]["gid"] == USER
    assert config["process"]["args"] == ["lazyfs"]
    blobs = list((bundle.parent / "image/blobs/sha256").iterdir())
    assert sum(path.stat().st_size for path in blobs) < MOST_BYTES
    rootfs = bundle / "rootfs"
    assert not (rootfs / "wheels").exists() or not list((rootfs / "wheels").iterdir())
    assert not (rootfs / "src").exists()
    assert not list((rootfs / "opt/lazyfs/lib").glob("*/site-packages/numpy/**/tests"))
    compiled = list((rootfs / "opt/lazyfs/lib").rglob("lazyfs/cli/__pycache__/main.*.pyc"))
    assert [path.read_bytes()[4:8] for path in compiled] == [b"\1\0\0\0"]      # by hash, unchecked: PEP 552
    sources = [path for name in ("sources.list", "sources.list.d", "apt.conf.d/99mmdebstrap")
               if (path := rootfs / "etc/apt" / name).exists() and (path.is_file() or list(path.iterdir()))]
    assert sources == [], "this machine's own mirrors"
