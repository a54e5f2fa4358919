"""A registry sends us to addresses that are closed to it: nothing is sent there, not even a connection is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PUBLIC, OTHER_PUBLIC, PUBLIC_6 = "1.2.3.4", "1.2.3.5", "2606:4700::7"
PRIVATE = ["10.9.8.7", "172.16.3.2", "192.168.5.5", "100.64.1.1", "fd12::7", "64:ff9b::a09:807"]
MACHINE = ["169.254.169.254", "127.0.0.9", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "::1"]
OWN = "10.0.0.2"     # of a registry on a private network
REGISTRY, STORE = "registry.test", "store.test"


def run(tmp_path: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In namespaces that have nothing but these addresses, and a name server of the test's own."""
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare and ip, for a network of its own")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:5 attempts:2\n")
    (tmp_path / "nsswitch.conf").write_text("hosts: files dns\n")
    addresses = [one for one in [PUBLIC, OTHER_PUBLIC, PUBLIC_6, OWN, *PRIVATE, *MACHINE]
                 if not one.startswith("127.") and one != "::1"]
    shell = ('mount --bind "$1/resolv.conf" /etc/resolv.conf && mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf '
             '&& exec "$2" -m tests.closednetwork "$3" "$4"')
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "slave", "--net", "sh", "-c", shell, "sh", tmp_path, sys.executable,
         json.dumps(cases), json.dumps(addresses)],
        capture_output=True, text=True, check=False, timeout=110, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def case(registry: str, store: list[str], way: str, **more: Any) -> dict[str, Any]:
    """The registry at one address sends us to a name that has others, one after the other."""
    url = f"http://{STORE}/{'token' if way == 'realm' else 'blob'}"
    return {"registry": REGISTRY, "names": {REGISTRY: [registry], STORE: store}, "way": way, "url": url, **more}


@pytest.mark.parametrize("way", ["redirect", "realm"])
def test_a_public_registry_cannot_send_us_inside(tmp_path: Path, way: str) -> None:
    closed = [*PRIVATE, *MACHINE]
    for address, found in zip(closed, run(tmp_path, [case(PUBLIC, [one], way) for one in closed]), strict=True):
        assert "may not send us there" in found["error"], (address, found)
        assert found["reached"] == [], address
        assert ("allow_private" in found["hint"]) == (address in PRIVATE), address


@pytest.mark.parametrize("way", ["redirect", "realm"])
def test_where_it_is_configured_it_can(tmp_path: Path, way: str) -> None:
    cases = [case(PUBLIC, [one], way, allow_private=True) for one in [*PRIVATE, *MACHINE]]
    found = run(tmp_path, cases)
    assert [one["error"] for one in found[: len(PRIVATE)]] == [""] * len(PRIVATE)
    assert all(one["reached"] for one in found[: len(PRIVATE)])
    assert all("link" in one["error"] and one["reached"] == [] for one in found[len(PRIVATE) :])


@pytest.mark.parametrize("way", ["redirect", "realm"])
def test_a_private_registry_can_send_us_to_private_and_public_addresses(tmp_path: Path, way: str) -> None:
    opened = [*PRIVATE, PUBLIC, PUBLIC_6]
    found = run(tmp_path, [case(OWN, [one], way) for one in [*opened, *MACHINE]])
    assert [one["error"] for one in found[: len(opened)]] == [""] * len(opened)
    assert all("may not send us there" in one["error"] and one["reached"] == [] for one in found[len(opened) :])
    if way == "redirect":
        assert not any(one["secrets"] for one in found), "credentials left their registry"


def test_a_name_that_changes_its_address_is_looked_at_again(tmp_path: Path) -> None:
    """DNS rebinding: what was public when it was first asked for is inside the next time."""
    cases = [case(PUBLIC, [OTHER_PUBLIC, one], "redirect", reads=2) for one in ("10.9.8.7", "169.254.169.254")]
    for found in run(tmp_path, cases):
        assert "may not send us there" in found["error"], found
        assert found["reached"] == [OTHER_PUBLIC]
