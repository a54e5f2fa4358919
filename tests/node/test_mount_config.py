"""`lazyfs mount` takes its defaults from the configuration; its options override them."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.convertkit import Layout, run_convert
from tests.mountkit import LAZYFS, Machine
from tests.tarbuilder import TarBuilder

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.mount


def lazyfs(machine: Machine, file: Path, *words: str | Path, code: int = 0) -> str:
    """The run directory comes from the file, too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LAZYFS_")}
    done = subprocess.run([*LAZYFS, *map(str, words)], env={**environment, "LAZYFS_CONFIG": str(file)},
                          capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code, done.stderr
    return done.stderr


def record(machine: Machine) -> dict[str, Any]:
    (path,) = machine.run_dir.glob("*/mounts/*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_defaults_are_configured_and_options_override(machine: Machine, tmp_path: Path) -> None:
    source = Layout(tmp_path / "in")
    source.add_image("app", [TarBuilder().file("f", b"x" * 100_000).build()])
    image = f"oci:{tmp_path / 'out'}:lazy"
    run_convert(source.reference("app"), image)
    file = tmp_path / "config.toml"
    file.write_text(f"""
        [daemon]
        run_dir = "{machine.run_dir}"
        cache_dir = "{machine.cache}"
        driver = "fuse"
        read_timeout_s = 17
        prefetch = false
    """)
    target = machine.target()
    lazyfs(machine, file, "mount", image, target)
    found = record(machine)
    assert (found["driver"], found["cache_dir"]) == ("fuse", str(machine.cache))
    assert (found["order"]["read_timeout_s"], found["order"]["prefetch"]) == (17.0, False)
    assert (target / "f").read_bytes() == b"x" * 100_000
    lazyfs(machine, file, "umount", target)
    other = tmp_path / "other-cache"
    lazyfs(machine, file, "mount", image, target, "--driver", "erofs", "--read-timeout", "5", "--cache-dir", other)
    found = record(machine)
    assert (found["cache_dir"], found["order"]["read_timeout_s"]) == (str(other), 5.0)
    lazyfs(machine, file, "umount", target)
    machine.assert_clean()


def test_a_broken_configuration_is_said_before_anything_is_mounted(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text("[daemon]\nprefetch = 'perhaps'\n")
    errors = lazyfs(machine, file, "mount", "oci:/nowhere:x", machine.target(), code=3)
    assert errors.startswith(f"lazyfs: error: {file}: daemon.prefetch: expected true or false, found 'perhaps'")
    assert not machine.run_dir.exists()
