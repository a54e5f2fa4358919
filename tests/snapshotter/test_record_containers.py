"""`lazyfs profile record` where containerd runs the containers: the list of one of them, by its id."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import pytest

from lazyfs.image.prefetch import parse_prefetch
from tests.lazyrig import running_node

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.mount
FILES = {name: random.Random(name).randbytes(200_000) for name in ("a", "b", "c")}


def test_what_a_container_of_containerd_has_read(tmp_path: Path) -> None:
    with running_node(tmp_path, "1.6") as node:
        image = node.push("app", FILES)
        node.pull(image)
        listed = tmp_path / "list"
        known: set[str] = set()
        found = {}
        for name in ("a", "b"):
            node.sums(image, [name])
            words = ("profile", "record", image, "--json", "-o", str(listed))
            with node.machine.start(*words) as process:
                out, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
            (mount,) = json.loads(out)["mounts"]
            (found[name],) = {one for one in mount["containers"] if one.startswith("run-")} - known
            known.add(found[name])
        paths = {entry.pattern for entry in parse_prefetch(listed.read_text()).entries}
        assert {b"data/a", b"data/b"} <= paths
        assert b"data/c" not in paths
        node.machine.lazyfs("profile", "record", found["b"], "-o", listed)
        paths = {entry.pattern for entry in parse_prefetch(listed.read_text()).entries}
        assert b"data/b" in paths
        assert b"data/a" not in paths
        node.remove_all()
        node.assert_nothing_left()
