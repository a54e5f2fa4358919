"""Signatures under containerd: the snapshotter refuses what no key of the node has signed, with the daemon's line."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import SignatureError
from lazyfs.registry import open_destination, open_source
from snapshotter.lazy import LABEL_IMAGE_REF, LABEL_MANIFEST
from tests.daemonkit import running_daemon
from tests.keykit import make_key
from tests.lazykit import OPTIONS, push_lazy
from tests.registrykit import require_registry, running_registry
from tests.snapshotter.test_lazy_images import FILES, Rig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.mountkit import Machine

pytestmark = pytest.mark.mount


@pytest.fixture
def host(tmp_path: Path) -> Iterator[str]:
    require_registry()
    with running_registry(tmp_path / "registry") as running:
        push_lazy(tmp_path, running.host, "app", FILES)
        push_lazy(tmp_path, running.host, "next", {"other": b"x"})
        yield running.host


def test_what_is_not_signed_is_not_mounted(
        machine: Machine, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor ahead of a container. Signed, it is; by the digest that was pulled, wherever its tag has gone since."""
    private, public = make_key(tmp_path, "ed25519")
    config = tmp_path / "config.toml"
    config.write_text(f"[verify]\npolicy = 'enforce'\nkeys = {json.dumps([str(public)])}\n")
    monkeypatch.setenv("LAZYFS_CONFIG", str(config))
    with closing(open_source(f"{host}/app:lazy", OPTIONS)) as source:
        pulled = source.root()
    with running_daemon(machine):
        rig = Rig(machine, host)
        layer = rig.layer(1, **{LABEL_IMAGE_REF: rig.image, LABEL_MANIFEST: pulled.digest.text})
        plain = rig.layer(2)
        lazy = rig.lazy()
        for attempt in (lazy.ensure_mounted, lazy.mount_ahead):
            with pytest.raises(SignatureError, match="nobody has signed"):
                attempt(layer)
        assert rig.mounted() == []
        machine.lazyfs("sign", rig.image, "--key", private)
        with closing(open_source(f"{host}/next:lazy", OPTIONS)) as source:
            other = source.root()
            with closing(open_destination(rig.image, OPTIONS)) as place:   # the tag moves
                for part in json.loads(other.data)["layers"] + [json.loads(other.data)["config"]]:
                    digest = type(other.digest)(part["digest"])
                    place.put_bytes(source.read_blob(digest, part["size"]), digest)
                place.commit(other)
        with pytest.raises(SignatureError, match="nobody has signed"):
            lazy.ensure_mounted(plain)     # without the label only its tag is known, and that is another image now
        tree = lazy.ensure_mounted(layer)
        assert {name: (tree / name).read_bytes() for name in FILES} == FILES
        assert lazy.ensure_mounted(plain) == tree     # the same bootstrap: its evidence is here
        for one in (layer, plain):
            lazy.forget(one)
        rig.assert_nothing_left()
