"""Which protocol a registry speaks need not be found again by a process that was told: for that registry only."""

from __future__ import annotations

import socket
import time

import pytest

from lazyfs.errors import SourceError
from lazyfs.registry.addresses import Origin
from lazyfs.registry.endpoint import Endpoint
from lazyfs.registry.options import RegistryOptions
from lazyfs.registry.transport import Transport


def endpoint(origin: str, *, host: str = "localhost", insecure: bool = True) -> Endpoint:
    """Nobody listens there: whoever asks gets an error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = RegistryOptions(insecure=insecure, origin=origin.format(port=port))
    return Endpoint(f"{host}:{port}", options, Transport(options))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_what_was_found_is_not_asked_for_again(scheme: str) -> None:
    known = endpoint(scheme + "://localhost:{port}")
    origin = known.origin(time.monotonic() + 5)
    assert (origin.scheme, origin.host) == (scheme, "localhost")
    assert known.known == f"{scheme}://{origin.netloc}"


@pytest.mark.parametrize("origin", ["", "http://localhost:1", "http://localhost", "http://other:{port}"])
def test_what_was_found_of_another_registry_says_nothing(origin: str) -> None:
    unknown = endpoint(origin)
    assert unknown.known == ""
    with pytest.raises(SourceError):
        unknown.origin(time.monotonic() + 5)


def test_plain_http_is_not_taken_up_where_it_is_not_allowed() -> None:
    strict = endpoint("http://registry.example:{port}", host="registry.example", insecure=False)
    assert strict.origin(time.monotonic() + 5).scheme == "https"


def test_default_ports_are_the_same_as_none() -> None:
    options = RegistryOptions(insecure=True, origin="http://registry.example:80")
    known = Endpoint("registry.example", options, Transport(options))
    assert known.origin(0.0) == Origin("http", "registry.example", 80)
