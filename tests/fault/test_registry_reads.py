"""Reads through a registry that misbehaves: the right bytes or the right error, in time."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import (
    AuthError,
    DeadlineError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RateLimitedError,
    SourceError,
)
from lazyfs.registry import RegistryOptions, open_destination, open_source
from lazyfs.registry.status import parse_retry_after
from tests.faultproxy import Fault, FaultProxy, Kind
from tests.ports import free_port
from tests.registrykit import Registry, running_registry
from tests.smallimage import SmallImage, write_image

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.registry.place import ByteStream

LAYER = random.Random(3).randbytes(512_000)
OPTIONS = RegistryOptions(request_deadline_s=4.0, io_timeout_s=0.8, connect_timeout_s=2.0)
SLACK_S = 4.0                    # this machine is shared
BLOBS = "/blobs/"
OFFSET, SIZE = 1000, 300_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Registry, SmallImage]]:
    with running_registry(tmp_path_factory.mktemp("registry")) as registry:
        destination = open_destination(f"{registry.host}/app:1", RegistryOptions())
        image = write_image(destination, [LAYER])
        destination.close()
        yield registry, image


@pytest.fixture
def proxy(served: tuple[Registry, SmallImage]) -> Iterator[FaultProxy]:
    with FaultProxy(served[0].host) as running:
        yield running


def drain(stream: ByteStream) -> bytes:
    with stream:
        return b"".join(iter(lambda: stream.read(65_536), b""))


def read_range(proxy: FaultProxy, image: SmallImage, seconds: float = 2.0, offset: int = OFFSET,
               size: int = SIZE) -> bytes:
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    try:
        with source.read_range(image.digest, offset, size, time.monotonic() + seconds) as stream:
            view = memoryview(bytearray(65_536))    # as fetch threads read
            return b"".join(bytes(view[:count]) for count in iter(lambda: stream.readinto(view), 0))
    finally:
        source.close()


def read_blob_stream(proxy: FaultProxy, image: SmallImage, options: RegistryOptions = OPTIONS) -> bytes:
    source = open_source(f"{proxy.host}/app:1", options)
    try:
        return drain(source.open_blob(image.digest, len(LAYER)))
    finally:
        source.close()


@pytest.mark.parametrize("fault", [
    Fault(Kind.SHORT, size=1), Fault(Kind.SHORT, size=SIZE), Fault(Kind.LONG, size=1), Fault(Kind.WRONG_LENGTH, size=5),
    Fault(Kind.WRONG_LENGTH, size=-5), Fault(Kind.IGNORE_RANGE), Fault(Kind.WRONG_RANGE), Fault(Kind.NO_CONTENT_RANGE),
    Fault(Kind.CUT, at=0), Fault(Kind.CUT, at=100_000), Fault(Kind.RESET, at=-1), Fault(Kind.RESET, at=100_000),
    Fault(Kind.GARBAGE), Fault(Kind.STALL, at=100_000), Fault(Kind.BLACK_HOLE), Fault(Kind.DRIP, seconds=0.05),
    Fault(Kind.STATUS, status=500), Fault(Kind.STATUS, status=502), Fault(Kind.STATUS, status=503),
    Fault(Kind.STATUS, status=408), Fault(Kind.DELAY, seconds=12.0),
], ids=lambda fault: f"{fault.kind.name}-{fault.at or fault.size or fault.status}")
def test_a_range_fails_as_transient_and_in_time(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault
) -> None:
    fault.path = BLOBS
    proxy.add(fault)
    started = time.monotonic()
    with pytest.raises(SourceError) as caught:
        read_range(proxy, served[1])
    assert time.monotonic() - started < 2.0 + SLACK_S
    assert caught.value.transient
    assert fault.applied == 1, "read_range does not retry"
    proxy.clear()
    assert read_range(proxy, served[1]) == LAYER[OFFSET : OFFSET + SIZE]


@pytest.mark.parametrize(("fault", "error"), [
    (Fault(Kind.STATUS, status=404), NotFoundError), (Fault(Kind.STATUS, status=403), AuthError),
    (Fault(Kind.STATUS, status=401), AuthError), (Fault(Kind.STATUS, status=400), SourceError),
    (Fault(Kind.STATUS, status=416), SourceError), (Fault(Kind.STATUS, status=501), SourceError),
    (Fault(Kind.ENCODING), SourceError),
], ids=lambda value: getattr(value, "status", None))
def test_what_will_not_get_better_is_not_transient(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault, error: type[SourceError]
) -> None:
    fault.path = BLOBS
    proxy.add(fault)
    with pytest.raises(error) as caught:
        read_range(proxy, served[1])
    assert not caught.value.transient


def test_the_deadline_bounds_a_dripping_body(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    proxy.add(Fault(Kind.DRIP, path=BLOBS, seconds=0.02))
    started = time.monotonic()
    with pytest.raises(DeadlineError):
        read_range(proxy, served[1], seconds=1.0)
    assert time.monotonic() - started < 1.0 + SLACK_S


@contextlib.contextmanager
def raw_server(answer: bytes, pause_s: float) -> Iterator[str]:
    """A server that sends `answer` byte by byte to each connection, whatever it is asked."""
    stop = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.05)

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            for byte in answer:
                if stop.wait(pause_s):
                    return
                connection.sendall(bytes([byte]))
            stop.wait()

    def serve() -> None:
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                threading.Thread(target=serve_one, args=(listener.accept()[0],), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stop.set()
        thread.join()
        listener.close()


@pytest.mark.parametrize("host_form", ["127.0.0.1", "127.1"], ids=["http", "tls-handshake"])
def test_the_deadline_bounds_a_dripping_header(served: tuple[Registry, SmallImage], host_form: str) -> None:
    """127.1 is this machine, but not by its name: it is spoken to by TLS."""
    header = b"HTTP/1.1 200 OK\r\n" + b"X-Never-Ending: yes\r\n" * 90
    with raw_server(header, 0.02) as host:
        source = open_source(f"{host.replace('127.0.0.1', host_form)}/app:1", OPTIONS)
        started = time.monotonic()
        with pytest.raises(SourceError) as caught:
            source.read_range(served[1].digest, 0, 10, started + 1.0)
        assert time.monotonic() - started < 1.0 + SLACK_S
        assert caught.value.transient or host_form == "127.1"
        source.close()


def test_a_server_that_accepts_and_says_nothing(served: tuple[Registry, SmallImage]) -> None:
    with raw_server(b"", 0.0) as host:
        for form in (host, host.replace("127.0.0.1", "127.1")):
            source = open_source(f"{form}/app:1", OPTIONS)
            started = time.monotonic()
            with pytest.raises(SourceError):
                source.read_range(served[1].digest, 0, 10, started + 1.0)
            assert time.monotonic() - started < 1.0 + SLACK_S
            with pytest.raises(SourceError):
                source.root()
            assert time.monotonic() - started < 1.0 + OPTIONS.request_deadline_s + 2 * SLACK_S
            source.close()


def test_nobody_listens(served: tuple[Registry, SmallImage]) -> None:
    source = open_source(f"127.0.0.1:{free_port()}/app:1", OPTIONS)
    with pytest.raises(SourceError, match=r"cannot connect to 127\.0\.0\.1:") as caught:
        source.read_range(served[1].digest, 0, 10, time.monotonic() + 1.0)
    assert caught.value.transient
    source.close()


@pytest.mark.parametrize("fault", [Fault(Kind.CHUNKED), Fault(Kind.DELAY, seconds=0.1),
                                   Fault(Kind.DRIP, size=50_000, seconds=0.01)], ids=lambda f: f.kind.name)
def test_what_is_odd_but_right(served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault) -> None:
    fault.path = BLOBS
    proxy.add(fault)
    assert read_range(proxy, served[1]) == LAYER[OFFSET : OFFSET + SIZE]
    assert read_blob_stream(proxy, served[1]) == LAYER
    proxy.add(Fault(Kind.IGNORE_RANGE, path=BLOBS))
    assert read_range(proxy, served[1], offset=0, size=len(LAYER)) == LAYER, "200 with exactly what was asked"


def test_chunked_bodies_too_long_or_short(served: tuple[Registry, SmallImage]) -> None:
    """The registry answers chunked with another range's bytes; a chunked body has no length to compare."""
    for size in (10, 12):
        body = b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-10/99\r\nTransfer-Encoding: chunked\r\n\r\n"
        body += b"%x\r\n%b\r\n0\r\n\r\n" % (size, b"x" * size)
        with raw_server(body, 0.0) as host:
            source = open_source(f"{host}/app:1", OPTIONS)
            with pytest.raises(SourceError, match=r"longer than 11|ended after 10 of 11"):
                drain(source.read_range(served[1].digest, 0, 11, time.monotonic() + 2.0))
            source.close()


@pytest.mark.parametrize(("headers", "seconds"), [({"Retry-After": "7"}, 7.0), ({}, None),
                                                  ({"Retry-After": "x"}, None)])
def test_rate_limits_say_how_long(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, headers: dict[str, str], seconds: float | None
) -> None:
    proxy.add(Fault(Kind.STATUS, path=BLOBS, status=429, headers=headers))
    with pytest.raises(RateLimitedError) as caught:
        read_range(proxy, served[1])
    assert caught.value.retry_after_s == seconds
    assert caught.value.transient


def test_retry_after_in_all_its_forms() -> None:
    assert parse_retry_after("0") == 0.0
    assert parse_retry_after("999999999") == 3600.0
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    for nonsense in (None, "", "-5", "1e9", "soon", "Wed, 99 Oct 2015 07:28:00 GMT", "9" * 5000):
        assert parse_retry_after(nonsense) is None


@pytest.mark.parametrize("fault", [
    Fault(Kind.CUT, at=100_000, times=2), Fault(Kind.RESET, at=150_000, times=2), Fault(Kind.RESET, at=-1, times=2),
    Fault(Kind.STALL, at=100_000, times=1), Fault(Kind.STATUS, status=503, times=2),
    Fault(Kind.STATUS, status=503, headers={"Retry-After": "1"}, times=1), Fault(Kind.BLACK_HOLE, times=1),
    Fault(Kind.WRONG_LENGTH, size=9, times=1), Fault(Kind.SHORT, size=9, times=1), Fault(Kind.LONG, size=9, times=1),
    Fault(Kind.GARBAGE, times=1),
], ids=lambda fault: f"{fault.kind.name}-{fault.at}")
def test_a_whole_blob_survives_what_passes(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault
) -> None:
    fault.path = BLOBS
    proxy.add(fault)
    assert read_blob_stream(proxy, served[1]) == LAYER
    assert fault.times == 0


def test_a_broken_stream_goes_on_where_it_was(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    proxy.add(Fault(Kind.CUT, path=BLOBS, at=100_000, times=2))
    assert read_blob_stream(proxy, served[1]) == LAYER
    ranges = [seen.headers.get("range", "") for seen in proxy.seen("GET", BLOBS)]
    end = len(LAYER) - 1
    assert ranges == ["", f"bytes=100000-{end}", f"bytes=200000-{end}"]
    expected = len(LAYER) + len(b"{}")    # {} answers GET /v2/
    deadline = time.monotonic() + 10
    while proxy.body_bytes_sent < expected and time.monotonic() < deadline:
        time.sleep(0.01)    # the proxy counts a piece after it was sent
    assert proxy.body_bytes_sent == expected, "nothing twice"


def test_a_blob_is_not_continued_with_other_bytes(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    proxy.add(Fault(Kind.CUT, path=BLOBS, at=100_000, times=1))
    proxy.add(Fault(Kind.IGNORE_RANGE, path=BLOBS))
    started = time.monotonic()
    with pytest.raises(SourceError):
        read_blob_stream(proxy, served[1])
    assert time.monotonic() - started < OPTIONS.request_deadline_s + SLACK_S


@pytest.mark.parametrize("fault", [Fault(Kind.CUT, at=10), Fault(Kind.DRIP, seconds=0.05), Fault(Kind.BLACK_HOLE),
                                   Fault(Kind.STALL, at=5000), Fault(Kind.STATUS, status=429)],
                         ids=lambda fault: fault.kind.name)
def test_a_blob_that_makes_no_progress_ends(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault
) -> None:
    fault.path = BLOBS
    proxy.add(fault)
    started = time.monotonic()
    with pytest.raises(SourceError) as caught:
        read_blob_stream(proxy, served[1])
    assert caught.value.transient
    # Opening, then reading: each may use its patience, and a window of the least rate on top.
    assert time.monotonic() - started < 2 * OPTIONS.request_deadline_s + 2 * OPTIONS.io_timeout_s + SLACK_S


def test_a_slow_reader_is_not_a_slow_server(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    with source.open_blob(served[1].digest, len(LAYER)) as stream:
        pieces = [stream.read(100)]
        time.sleep(2.5 * OPTIONS.io_timeout_s)
        pieces.append(stream.read(100))
        time.sleep(2.5 * OPTIONS.io_timeout_s)
        pieces.append(drain(stream))
    assert b"".join(pieces) == LAYER
    source.close()


def test_bit_flips(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    """Streams pass bytes on for the caller to check; what is checked here is asked for once more."""
    image = served[1]
    flip = proxy.add(Fault(Kind.FLIP, path=BLOBS, at=17))
    got = read_range(proxy, image)
    assert got != LAYER[OFFSET : OFFSET + SIZE]
    assert len(got) == SIZE
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    with pytest.raises(IntegrityError):
        source.read_blob(image.digest, len(LAYER))
    flip.times = 1
    assert source.read_blob(image.digest, len(LAYER)) == LAYER
    proxy.clear()
    proxy.add(Fault(Kind.FLIP, path="/manifests/", at=30))
    for read in (source.root, lambda: source.document(image.document.digest)):
        with pytest.raises((IntegrityError, FormatError)):
            read()
    source.close()


@pytest.mark.parametrize("fault", [
    Fault(Kind.RESET, at=-1, times=2), Fault(Kind.CUT, at=5, times=1), Fault(Kind.STATUS, status=503, times=2),
    Fault(Kind.STATUS, status=429, headers={"Retry-After": "1"}, times=1), Fault(Kind.BLACK_HOLE, times=1),
    Fault(Kind.SHORT, size=5, times=1), Fault(Kind.GARBAGE, times=1),
], ids=lambda fault: fault.kind.name)
def test_manifests_survive_what_passes(
    served: tuple[Registry, SmallImage], proxy: FaultProxy, fault: Fault
) -> None:
    fault.path = "/manifests/"
    proxy.add(fault)
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    assert source.root() == served[1].document
    source.close()
    assert fault.times == 0


def test_manifests_too_large_or_not_json(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    for body in (b"{" + b" " * (4 << 20), b"<html>", b"", b"\xff"):
        proxy.clear()
        proxy.add(Fault(Kind.STATUS, path="/manifests/", status=200, body=body))
        with pytest.raises(FormatError):
            source.root()
    source.close()


def test_errors_show_the_registrys_code_and_no_control_characters(
    served: tuple[Registry, SmallImage], proxy: FaultProxy
) -> None:
    body = b'{"errors":[{"code":"DENIED","message":"no\\u001b[31m way\\nat all?token=hunter2"}]}'
    proxy.add(Fault(Kind.STATUS, path=BLOBS, status=403, body=body))
    with pytest.raises(AuthError) as caught:
        read_range(proxy, served[1])
    assert "DENIED" in str(caught.value)
    assert str(caught.value).isprintable()
    assert "hunter2" not in str(caught.value)


def test_a_registry_that_comes_back(served: tuple[Registry, SmallImage], proxy: FaultProxy) -> None:
    source = open_source(f"{proxy.host}/app:1", OPTIONS)
    with source.open_blob(served[1].digest, len(LAYER)) as stream:
        pieces = [stream.read(1000)]
        proxy.down()
        timer = threading.Timer(0.5, proxy.up)
        timer.start()
        pieces.append(drain(stream))
    timer.join()
    assert b"".join(pieces) == LAYER
    assert source.root() == served[1].document
    source.close()
