"""What the node's configuration says about registries holds for images that are mounted already, too."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

from lazyfs.registry import RegistryOptions
from tests.convertkit import Layout, run_convert
from tests.lazyrig import WAIT_S, busybox_layer, running_node
from tests.mountkit import LAZYFS
from tests.registrykit import running_registry
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lazyrig import Node
    from tests.registrykit import Registry

USER, PASSWORD = "kim", "a-password-for-tests"


def push(node: Node, registry: Registry) -> str:
    layout = Layout(node.machine.directory / "source")
    layout.add_image("app", [busybox_layer(), TarBuilder().directory("data").file("data/f", b"content").build()])
    image = f"{registry.host}/app:lazy"
    run_convert(layout.reference("app"), f"docker://{image}",
                registry=RegistryOptions(insecure=True, username=USER, password=PASSWORD))
    return image


def pull(node: Node, image: str, *words: str) -> str:
    """With the password on this command line only; returns what it wrote to stderr."""
    done = subprocess.run(
        [*LAZYFS, "pull", "--containerd-address", node.containerd.address, "--username", USER, *words, image],
        env={**node.machine.environment, "LAZYFS_PASSWORD": PASSWORD}, capture_output=True, text=True, check=False,
        timeout=60)
    assert done.returncode == 0, done.stderr
    assert PASSWORD not in done.stderr
    return done.stderr


def read(node: Node, image: str) -> str | None:
    """A file out of a container; None: it cannot be read."""
    words = ("run", "--rm", "--snapshotter", "lazyfs", image, f"read-{time.monotonic_ns()}", "/bin/busybox", "cat",
             "/data/f")
    with node.containerd.start_ctr(*words) as running:
        output, _ = running.communicate(timeout=60)
    return output if running.returncode == 0 else None


def test_a_configuration_repairs_an_image_that_was_pulled_with_options(tmp_path: Path) -> None:
    """It was in the mount's record for ever: neither upgrade nor restart helped, only removing the image."""
    with running_registry(tmp_path / "private", username=USER, password=PASSWORD) as registry, \
            running_node(tmp_path, "1.6") as node:
        image = push(node, registry)
        assert f'[registry.host."{registry.host}"]' in pull(node, image)
        assert read(node, image) is None   # what the command line said is not the node's
        assert f"{registry.host}/app" in (node.machine.directory / "daemon.log").read_text()

        password = node.machine.directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        file = node.machine.directory / "config.toml"
        file.write_text(f'[registry.host."{registry.host}"]\nusername = "{USER}"\npassword_file = "{password}"\n')
        node.machine.lazyfs("daemon", "--config", file, "upgrade")
        deadline = time.monotonic() + WAIT_S
        while (found := read(node, image)) is None:   # an error is remembered for a moment
            assert time.monotonic() < deadline, (node.machine.directory / "daemon.log").read_text()
        assert found == "content"


def test_a_pull_tells_what_the_node_must_know_only_where_it_does_not(tmp_path: Path) -> None:
    with running_registry(tmp_path / "private", username=USER, password=PASSWORD) as registry, \
            running_node(tmp_path, "1.6") as node:
        image = push(node, registry)
        password = node.machine.directory / "password"
        password.write_text(PASSWORD)
        password.chmod(0o600)
        file = node.machine.directory / "config.toml"
        file.write_text(f'[registry.host."{registry.host}"]\nusername = "{USER}"\npassword_file = "{password}"\n')
        os.environ["LAZYFS_CONFIG"] = str(file)
        try:
            assert "registry.host" not in pull(node, image)
        finally:
            del os.environ["LAZYFS_CONFIG"]
        plain = node.push("plain", {}, lazy=False)
        done = subprocess.run([*LAZYFS, "pull", "--containerd-address", node.containerd.address, "--insecure", plain],
                              env=node.machine.environment, capture_output=True, text=True, check=True, timeout=60)
        assert "registry.host" not in done.stderr   # nothing of it comes later
