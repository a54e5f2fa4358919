"""What a pull's options say that the node's configuration does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lazyfs.registry.forhost import missing_settings
from lazyfs.registry.options import HostSettings, RegistryOptions

HOST = "registry.example:5000"


@pytest.mark.parametrize(("given", "missing"), [
    (RegistryOptions(), []),
    (RegistryOptions(insecure=True), ["insecure"]),
    (RegistryOptions(username="kim", password="p"), ["username", "password_file"]),
    (RegistryOptions(ca_file=Path("/ca")), ["ca_file"]),
    (RegistryOptions(client_cert=Path("/c"), client_key=Path("/k")), ["client_cert", "client_key"]),
])
def test_what_is_missing_is_named_until_it_is_configured(given: RegistryOptions, missing: list[str]) -> None:
    assert missing_settings(given, RegistryOptions(), HOST) == missing
    own = HostSettings(username="x", password_file=Path("/p"), insecure=True, ca_file=Path("/ca"),
                       client_cert=Path("/c"), client_key=Path("/k"))
    assert missing_settings(given, RegistryOptions(hosts={HOST: own}), HOST) == []
    assert missing_settings(given, RegistryOptions(hosts={"registry.example": own}), HOST) == missing


def test_hosts_toml_says_whom_to_trust_but_not_who_we_are(tmp_path: Path) -> None:
    (tmp_path / "registry.example_5000_").mkdir()
    (tmp_path / "registry.example_5000_" / "hosts.toml").write_text("")
    configured = RegistryOptions(hosts_dir=tmp_path)
    given = RegistryOptions(insecure=True, ca_file=Path("/ca"), username="kim", password="p")
    assert missing_settings(given, configured, HOST) == ["username", "password_file"]
    assert missing_settings(given, configured, "other.example") == ["username", "password_file", "insecure", "ca_file"]


@pytest.mark.parametrize("host", ["localhost:5000", "127.0.0.1:5000", "[::1]:5000"])
def test_this_machine_needs_no_insecure(host: str) -> None:
    assert missing_settings(RegistryOptions(insecure=True), RegistryOptions(), host) == []
