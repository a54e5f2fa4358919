"""The mirror in `lazyfs doctor` and `lazyfs status`: what is wrong is named, and what it did is told by source."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs import config
from lazyfs.cli import mirror_status
from lazyfs.doctor import Subject, examine
from lazyfs.doctor.mirror import check_mirror
from lazyfs.image.digest import Digest
from tests.mirrorkit import RunningMirror, ask, image_of, push, running_mirror
from tests.mountkit import LAZYFS
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[RunningMirror]:
    root = tmp_path / "containerd"
    (root / "io.containerd.content.v1.content/blobs/sha256").mkdir(parents=True)
    with running_mirror(tmp_path, mirror={"containerd_root": str(root)}) as found:
        yield found


def install(mirror: RunningMirror, *words: str) -> None:
    environment = {**os.environ, "LAZYFS_CONFIG": str(mirror.config)}
    subprocess.run([*LAZYFS, "mirror", *words], env=environment, check=True, timeout=60, capture_output=True)


def found(mirror: RunningMirror, containerd: str = "", **keys: Any) -> list[tuple[str, str]]:
    """Name and status of each line of the doctor's."""
    settings = config.load(str(mirror.config))
    file = mirror.directory / "containerd.toml"
    file.write_text(containerd)
    subject = Subject(replace(settings, mirror=replace(settings.mirror, **keys)), "", str(file))
    results = list(examine(subject, (check_mirror,)))
    assert all(bool(one.hint) == (one.status.value != "ok") for one in results)
    return [(one.name, one.status.value) for one in results]


def test_the_doctor_looks_at_the_mirror(mirror: RunningMirror, tmp_path: Path) -> None:
    certs = tmp_path / "certs.d"
    good = f'[plugins."io.containerd.cri.v1.images".registry]\nconfig_path = "/other:{certs}"\n'
    assert found(mirror) == [("mirror", "ok"), ("mirror's clients", "warning"), ("containerd's blobs", "ok")]
    install(mirror, "install", "--config-path", str(certs))
    assert found(mirror, good) == [("mirror", "ok"), ("mirror's clients", "ok"), ("containerd's blobs", "ok")]
    other = good.replace(str(certs), "/elsewhere") + "discard_unpacked_layers = true\n"
    assert found(mirror, other)[2:] == [("containerd's blobs", "ok"), ("containerd's blobs", "warning"),
                                        ("mirror's clients", "warning")]
    assert ("containerd's blobs", "warning") in found(mirror, containerd_root=str(tmp_path / "gone"))
    assert found(mirror, address="") == [("mirror", "failed")]
    (certs / "_default/hosts.toml").write_text('server = "https://other"\n')
    assert found(mirror, good)[1] == ("mirror's clients", "warning")
    mirror.stop()
    assert found(mirror, good)[0] == ("mirror", "failed")


def test_nothing_is_said_of_a_mirror_that_nobody_wants(tmp_path: Path) -> None:
    found = config.Config()
    assert list(check_mirror(Subject(replace(found, mirror=replace(found.mirror, dir=str(tmp_path)))))) == []


def test_the_status_tells_what_came_from_where(mirror: RunningMirror, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    image = image_of([os.urandom(300_000)])
    with running_registry(tmp_path) as registry:
        push(registry.host, "s", "1", image)
        assert mirror.get("/v2/s/manifests/1", ns=registry.host).status == 200
        for _ in range(2):
            for blob in image.blobs:
                assert mirror.get(f"/v2/s/blobs/{Digest.of(blob)}", ns=registry.host).status == 200
    monkeypatch.setenv("LAZYFS_CONFIG", str(mirror.config))
    told = mirror_status.ask_mirror()
    assert told is not None
    size = sum(map(len, image.blobs))
    assert told["fetched_bytes"] == {"peers": 0, "registry": size}
    assert (told["sent_bytes"]["registry"], told["sent_bytes"]["pieces"]) == (size + len(image.data), size)
    text = "\n".join(mirror_status.lines_of(told))
    assert mirror.host in text
    assert "pieces 300 kB" in text
    assert "sha256:" not in ask(mirror.host, "GET", "/status").body.decode()      # names by which things are given
    mirror.stop()
    assert "does not answer" in "\n".join(mirror_status.lines_of(mirror_status.ask_mirror()))


def test_a_mirror_with_peers_and_one_that_answers_nonsense_are_drawn() -> None:
    peers = {"why": "", "cluster": "c", "membership": {"kind": "static", "members": 3, "lost_s": 0.0},
             "uploads": {"bytes": 1 << 20}, "away": ["n2"], "lied": ["n2"]}
    told = {"address": "a:1", "why": "", "sent_bytes": {}, "requests": {}, "fetched_bytes": {"peers": 1, "registry": 2},
            "wrong_pieces": {"mended": 3}, "peers": peers}
    text = "\n".join(mirror_status.lines_of(json.loads(json.dumps(told))))
    assert "3 members of c" in text
    assert "gave wrong bytes: n2" in text
    assert "3 wrong pieces mended" in text
    lost = {**told, "peers": {"why": "no certificate", "cluster": "c"}}
    assert "without peers: no certificate" in "\n".join(mirror_status.lines_of(lost))
    assert list(mirror_status.lines_of(None)) == []
