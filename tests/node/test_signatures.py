"""Signatures before a mount: what is not signed by a key of the node is refused, in one line, and nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import LazyfsError, SignatureError
from lazyfs.image.digest import Digest
from lazyfs.image.signature import PAYLOAD_BYTES_MAX, add_signature, build_payload, signature_tag
from lazyfs.node import protocol
from lazyfs.node.order import MountOrder
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.fields import to_fields
from tests.convertkit import registry_with, tar_of
from tests.daemonkit import Daemon, running_daemon
from tests.faultproxy import FaultProxy
from tests.keykit import make_key
from tests.lazykit import unpack_bootstrap
from tests.mountkit import LAZYFS, Machine, require_mounting

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lazyfs.image.descriptor import Document
    from tests.registrykit import Registry

pytestmark = pytest.mark.mount
FILES = {"a": bytes(range(256)) * 3000}
NAMES = ["app", "other", "third", "index"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    require_mounting()
    images = {name: [tar_of({**FILES, "name": name.encode()})] for name in NAMES}
    with registry_with(tmp_path_factory.mktemp("registry"), images) as running:
        yield running


@pytest.fixture
def registry(shared: Registry) -> Registry:
    """Without signatures of the test before."""
    for name in NAMES:
        path = shared.storage / f"docker/registry/v2/repositories/{name}/_manifests/tags"
        for tag in path.glob("sha256-*.sig"):
            subprocess.run(["rm", "-r", tag], check=True)
    return shared


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "machine")
    made.directory.mkdir()
    yield made
    made.close()


@pytest.fixture
def proxy(registry: Registry) -> Iterator[FaultProxy]:
    """The registry, which can be away for a while."""
    with FaultProxy(registry.host) as running:
        yield running


class Signer:
    """Keys, and what a node's configuration says about them."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.private, self.public = make_key(directory, "p256")
        self.config = directory / "config.toml"
        monkeypatch.setenv("LAZYFS_CONFIG", str(self.config))
        self.write("enforce", self.public)

    def write(self, policy: str, *keys: Path, more: str = "") -> None:
        names = json.dumps([str(key) for key in keys])
        self.config.write_text(f'[verify]\npolicy = "{policy}"\nkeys = {names}\ntimeout_s = 10\n{more}')


@pytest.fixture
def signer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Signer:
    return Signer(tmp_path, monkeypatch)


def mount(machine: Machine, image: str, *, code: int = 0, name: str = "mnt") -> str:
    target = machine.target(name)
    said = machine.mount(image, target, "--insecure", code=code)
    if code == 0:
        assert (target / "a").read_bytes() == FILES["a"]
        machine.umount(target)
    else:
        assert not machine.mounts() or all(entry.target != str(target) for entry in machine.mounts())
        assert said.count("error:") == 1
    return said


def document_of(image: str) -> Document:
    with closing(open_source(image, RegistryOptions())) as source:
        return source.root()


def put(image: str, subject: Digest, payload: bytes, value: bytes) -> None:
    """A manifest of one signature under the tag of `subject`, whatever it says."""
    repository = image.rpartition(":")[0]
    with closing(open_destination(f"{repository}:{signature_tag(subject)}", RegistryOptions())) as place:
        document, config = add_signature(None, payload, value)
        place.put_bytes(payload, Digest.of(payload))
        place.put_bytes(config, Digest.of(config))
        place.commit(document)


def sign(machine: Machine, image: str, key: Path) -> None:
    machine.lazyfs("sign", image, "--key", key)


def test_a_signed_image_is_mounted_and_no_other(machine: Machine, registry: Registry, signer: Signer) -> None:
    """By the worker of `lazyfs mount` and by the daemon's."""
    image = f"{registry.host}/app:lazy"
    said = mount(machine, image, code=SignatureError.exit_code)
    assert "nobody has signed sha256:" in said
    machine.assert_clean()
    sign(machine, image, signer.private)
    mount(machine, image)
    with running_daemon(machine):
        mount(machine, image)
        assert "nobody has signed" in mount(machine, f"{registry.host}/other:lazy", code=SignatureError.exit_code)
    machine.lazyfs("verify", image, "--key", signer.public)
    machine.lazyfs("verify", f"{registry.host}/other:lazy", "--key", signer.public, code=SignatureError.exit_code)


def test_a_signature_that_does_not_count_is_none(machine: Machine, registry: Registry, signer: Signer,
                                                 tmp_path: Path) -> None:
    image, other = f"{registry.host}/app:lazy", f"{registry.host}/other:lazy"
    strange, _ = make_key(tmp_path, "ed25519")
    subject = document_of(image).digest
    from lazyfs.image.keys import sign as sign_bytes  # noqa: PLC0415

    def signed(payload: bytes, key: Path = signer.private) -> tuple[bytes, bytes]:
        return payload, sign_bytes(key.read_bytes(), None, payload, "key")[0]

    claim = build_payload(subject, "app")
    cases = {
        "another key": (signed(claim, strange), "none of the keys"),
        "another image": (signed(build_payload(document_of(other).digest, "app")), "for another image"),
        "tampered": ((claim.replace(b"app", b"apq"), signed(claim)[1]), "none of the keys"),
        "no claim": (signed(b'{"critical": 1}'), "1 signatures"),
        "huge": (signed(claim + b" " * PAYLOAD_BYTES_MAX), "nobody has signed"),
    }
    with running_daemon(machine):
        for name, ((payload, value), expected) in cases.items():
            put(image, subject, payload, value)
            assert expected in mount(machine, image, code=SignatureError.exit_code), name
        put(image, subject, *signed(claim))
        mount(machine, image)


def test_keys_are_rotated_without_a_restart_and_a_key_that_is_gone_does_not_count(
        machine: Machine, registry: Registry, signer: Signer, tmp_path: Path) -> None:
    """What was verified is kept as evidence: it is looked at with the keys of today."""
    image = f"{registry.host}/third:lazy"
    private, public = make_key(tmp_path, "ed25519")
    ring = tmp_path / "ring.pub"
    ring.write_bytes(signer.public.read_bytes())
    signer.write("enforce", ring)
    with running_daemon(machine):
        sign(machine, image, signer.private)
        mount(machine, image)
        ring.write_bytes(public.read_bytes())
        assert "none of the keys" in mount(machine, image, code=SignatureError.exit_code)
        ring.write_bytes(public.read_bytes() + signer.public.read_bytes())
        mount(machine, image)
        sign(machine, image, private)
        ring.write_bytes(public.read_bytes())
        mount(machine, image)
        ring.unlink()
        assert "ring.pub" in mount(machine, image, code=2)


def order_of(daemon: Daemon, image: str, layer: str, directory: Path, name: str = "mnt") -> MountOrder:
    """As the snapshotter's."""
    return MountOrder(image, str(daemon.machine.target(name)), layer=(layer, 0, 0), bootstrap_dir=str(directory),
                      registry=to_fields(RegistryOptions(insecure=True)))


def ask(daemon: Daemon, order: MountOrder, *, ensure: bool = True) -> None:
    with protocol.ControlClient.connect(daemon.directory.socket) as client:
        client.request(protocol.MOUNT, 60, order=order.to_json(), ensure=ensure)


def test_what_containerd_unpacked_must_be_what_was_signed(
        machine: Machine, proxy: FaultProxy, signer: Signer, tmp_path: Path) -> None:
    """And when it was, a takeover, a restart and another mount need no registry."""
    image, other = f"{proxy.host}/app:lazy", f"{proxy.host}/other:lazy"
    layer, strange = (unpack_bootstrap(one, tmp_path / name) for one, name in ((image, "app"), (other, "other")))
    sign(machine, image, signer.private)
    with running_daemon(machine) as daemon:
        with pytest.raises(SignatureError, match="another bootstrap"):
            ask(daemon, order_of(daemon, image, strange, tmp_path / "other"))
        with pytest.raises(SignatureError, match="nobody has signed"):
            ask(daemon, order_of(daemon, other, strange, tmp_path / "other"))
        assert not [entry for entry in machine.mounts() if entry.fs_type == "erofs"]
        order = order_of(daemon, image, layer, tmp_path / "app")
        ask(daemon, order)
        assert (machine.directory / "mnt/a").read_bytes() == FILES["a"]
        with pytest.raises(SignatureError, match="nobody has signed"):   # the same content by a name without signature
            ask(daemon, order_of(daemon, f"{proxy.host}/index:lazy", strange, tmp_path / "other", "again"))
        proxy.down()
        try:
            worker = daemon.worker()
            os.kill(worker, signal.SIGKILL)
            daemon.wait_ready(not_worker=worker)
            assert (machine.directory / "mnt/a").read_bytes() == FILES["a"]
            ask(daemon, order_of(daemon, image, layer, tmp_path / "app", "again"), ensure=False)
            for name in ("mnt", "again"):
                machine.umount(machine.directory / name)
            ask(daemon, order)
            machine.umount(machine.directory / "mnt")
            with pytest.raises(LazyfsError):   # nothing is known about this one, and nobody can be asked
                ask(daemon, order_of(daemon, other, strange, tmp_path / "other"))
        finally:
            proxy.up()


def test_evidence_that_was_changed_on_disk_is_none(
        machine: Machine, proxy: FaultProxy, signer: Signer, tmp_path: Path) -> None:
    image = f"{proxy.host}/app:lazy"
    layer = unpack_bootstrap(image, tmp_path / "app")
    sign(machine, image, signer.private)
    with running_daemon(machine) as daemon:
        order = order_of(daemon, image, layer, tmp_path / "app")
        ask(daemon, order)
        machine.umount(machine.directory / "mnt")
        (path,) = (machine.cache / "signatures").iterdir()
        good = path.read_bytes()
        assert path.parent.stat().st_mode & 0o777 == 0o700
        for bad in (b"", b"{}", good[:-10], good.replace(b'"value":"', b'"value":"AA'), b"[" * 5000):
            path.write_bytes(bad)
            proxy.down()
            try:
                with pytest.raises(LazyfsError):
                    ask(daemon, order)
            finally:
                proxy.up()
        ask(daemon, order)      # asked for again
        assert path.read_bytes() == good
        machine.umount(machine.directory / "mnt")


def test_warn_says_what_enforce_would_refuse_and_rules_are_by_repository(
        machine: Machine, registry: Registry, signer: Signer) -> None:
    rule = f'[verify.rule."{registry.host}/other"]\nkeys = ["{signer.public}"]\n'
    signer.write("warn", signer.public, more=rule)
    with running_daemon(machine):
        mount(machine, f"{registry.host}/app:lazy")
        assert "used all the same" in (machine.directory / "daemon.log").read_text()
        mount(machine, f"{registry.host}/other:lazy", code=SignatureError.exit_code)


def test_what_is_fetched_on_request_must_be_signed_too(machine: Machine, registry: Registry, signer: Signer) -> None:
    """By the command itself, and by the daemon."""
    words = ("cache", "--cache-dir", machine.cache, "fetch", f"{registry.host}/app:lazy", "--insecure")
    said = machine.lazyfs(*words, code=SignatureError.exit_code)
    assert "nobody has signed sha256:" in said
    with running_daemon(machine):
        assert "nobody has signed sha256:" in machine.lazyfs(*words, code=SignatureError.exit_code)
        assert not list(machine.cache.rglob("data.*"))
        sign(machine, f"{registry.host}/app:lazy", signer.private)
        machine.lazyfs(*words)
    machine.lazyfs(*words)


def test_an_index_vouches_for_its_images(machine: Machine, registry: Registry, signer: Signer) -> None:
    image = document_of(f"{registry.host}/index:lazy")
    with closing(open_destination(f"{registry.host}/index:all", RegistryOptions())) as place:
        data = json.dumps({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [{
            "mediaType": image.media_type, "digest": image.digest.text, "size": len(image.data),
            "platform": {"os": "linux", "architecture": "amd64"}}]}).encode()
        place.commit(type(image)(data, "application/vnd.oci.image.index.v1+json", Digest.of(data)))
    with running_daemon(machine):
        mount(machine, f"{registry.host}/index:all", code=SignatureError.exit_code)
        sign(machine, f"{registry.host}/index:all", signer.private)
        mount(machine, f"{registry.host}/index:all")


def test_signing_says_what_is_wrong(machine: Machine, registry: Registry, signer: Signer, tmp_path: Path) -> None:
    image = f"{registry.host}/app:lazy"
    machine.lazyfs("sign", image, "--key", tmp_path / "none.key", code=2)
    machine.lazyfs("sign", image, "--key", signer.public, code=2)
    machine.lazyfs("sign", "oci-archive:/x.tar:y", "--key", signer.private, code=2)
    done = subprocess.run([*LAZYFS, "sign", image, "--key", str(signer.private), "--json"], capture_output=True,
                          check=True, env=machine.environment)
    found = json.loads(done.stdout)
    assert found["subject"] == document_of(image).digest.text
    assert found["signature"].endswith(f"{signature_tag(Digest(found['subject']))}")
