"""A registry's name as containerd's labels have it, without its port: which one is meant."""

from __future__ import annotations

import pytest

from snapshotter.lazymake import with_port


@pytest.mark.parametrize(("host", "known", "found"), [
    ("r.example", [], "r.example"),
    ("r.example", ["other.example:5000", "xr.example:5000"], "r.example"),
    ("r.example", ["other.example", "r.example:5000", "r.example:6000"], "r.example:5000"),
    ("r.example", ["r.example:5000", "r.example"], "r.example"),
    ("::1", [], "[::1]"),
    ("::1", ["[::1]:5000"], "[::1]:5000"),
    ("::1", ["[::1]:5000", "[::1]"], "[::1]"),
])
def test_the_port_is_that_of_the_registry_that_is_known(host: str, known: list[str], found: str) -> None:
    assert with_port(host, known) == found
