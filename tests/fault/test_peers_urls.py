"""`lazyfs get` and the mirror as a proxy: the right bytes, kept and shared, and only for whom and where it may."""

from __future__ import annotations

import hashlib
import random
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from click.testing import CliRunner

from lazyfs.cli.main import group
from lazyfs.errors import IntegrityError, LazyfsError, NotFoundError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.limits import MIB
from lazyfs.mirror.geturl import Getter, Got, Wanted
from lazyfs.mirror.urls import Target, Urls
from lazyfs.registry.addresses import Reach
from lazyfs.registry.options import RegistryOptions
from tests.urlkit import WebServer, mirror_beside, web_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = random.Random(3).randbytes(2 * MIB + 77)
PATH = "/models/one.bin"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server({PATH: DATA}) as running:
        yield running


def get(url: str, output: Path, mirror: str = "", **wanted: Any) -> Got:
    urls = Urls(RegistryOptions())
    try:
        wanted.setdefault("headers", {})
        getter = Getter(urls, Wanted(url, **wanted), mirror, begun=lambda size, done: None, progress=lambda size: None)
        return getter.get(output)
    finally:
        urls.close()


async def get_async(*args: Any, **wanted: Any) -> Got:
    return await trio.to_thread.run_sync(partial(get, *args, **wanted))


async def ask(mirror: str, head: str) -> tuple[int, dict[str, str], bytes]:
    """One request as it is written; status, headers and body until the connection ends."""
    host, _, port = mirror.partition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(head.replace("\n", "\r\n").encode() + b"Connection: close\r\n\r\n")
        data = b"".join([part async for part in stream])
    first, _, body = data.partition(b"\r\n\r\n")
    status, *lines = first.decode("latin-1").split("\r\n")
    return int(status.split()[1]), {name.lower(): value.strip() for name, _, value in (
        line.partition(":") for line in lines)}, body


# --- lazyfs get, directly ---

@pytest.mark.parametrize(("has_head", "has_ranges"), [(True, True), (False, True), (True, False)])
def test_a_file_comes_whole(server: WebServer, tmp_path: Path, has_head: bool, has_ranges: bool) -> None:
    server.has_head, server.has_ranges = has_head, has_ranges
    got = get(f"http://{server.host}{PATH}", tmp_path / "file", digest=Digest.of(DATA))
    assert (tmp_path / "file").read_bytes() == DATA
    assert (got.size, got.by, got.digest) == (len(DATA), "origin", Digest.of(DATA))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cut_is_gone_on_from(server: WebServer, tmp_path: Path) -> None:
    server.cut_after = MIB
    get(f"http://{server.host}{PATH}", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    assert server.body_bytes <= len(DATA) + MIB // 4


def test_an_interrupted_get_goes_on_later_but_not_with_another_version(server: WebServer, tmp_path: Path) -> None:
    url = f"http://{server.host}{PATH}"

    class StoppedError(Exception):
        pass

    def interrupt(size: int) -> None:
        raise StoppedError

    urls = Urls(RegistryOptions())
    getter = Getter(urls, Wanted(url, {}), "", begun=lambda size, done: None, progress=interrupt)
    with pytest.raises(StoppedError):
        getter.get(tmp_path / "file")
    urls.close()
    [part] = tmp_path.iterdir()
    assert part.name.startswith(".file.")
    assert get(url, tmp_path / "file").resumed_bytes > 0
    assert (tmp_path / "file").read_bytes() == DATA
    part.write_bytes(b"x" * 1000)
    server.etags[PATH] = '"two"'
    assert get(url, tmp_path / "file").resumed_bytes == 0


def test_another_digest_leaves_nothing(server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="expected sha256"):
        get(f"http://{server.host}{PATH}", tmp_path / "file", digest=Digest.of(b"other"))
    assert list(tmp_path.iterdir()) == []


def test_what_the_server_says_of_the_digest_counts(server: WebServer, tmp_path: Path) -> None:
    server.headers[PATH] = {"X-Linked-Etag": f'"{"0" * 64}"'}
    with pytest.raises(IntegrityError):
        get(f"http://{server.host}{PATH}", tmp_path / "file")


def test_credentials_do_not_follow_a_redirect(server: WebServer, tmp_path: Path) -> None:
    with web_server() as other:
        other.files["/there"] = DATA
        server.redirects["/here"] = f"http://{other.host}/there"
        get(f"http://{server.host}/here", tmp_path / "file", headers={"authorization": "Bearer s3cret"})
        assert all("authorization" not in headers for _, _, headers in other.asked)
        assert any(headers.get("authorization") == "Bearer s3cret" for _, _, headers in server.asked)


def test_a_public_server_may_not_lead_to_this_machine(server: WebServer) -> None:
    urls = Urls(RegistryOptions())
    with pytest.raises(SourceError, match="may not send us there"):
        urls.look(Target(f"http://{server.host}{PATH}", reach=Reach.PRIVATE))
    urls.close()
    assert server.asked == []


def test_signed_urls_of_one_thing_name_one_thing() -> None:
    one = Target("https://h/a?X-Amz-Signature=1&X-Amz-Date=2&v=3")
    assert one.identity == Target("https://H/a?v=3&X-Amz-Signature=9").identity == "https://h/a?v=3"
    assert one.identity != Target("https://h/a?v=4").identity


def test_the_command(server: WebServer, tmp_path: Path) -> None:
    url = f"http://{server.host}{PATH}"
    run = CliRunner().invoke(group, ["get", url, "-o", "-", "--mirror", "off", "-q"])
    assert run.exit_code == 0, run.output
    assert run.stdout_bytes == DATA
    secret = tmp_path / "headers"
    secret.write_text("Authorization: Bearer x\n")
    server.secret = "Bearer x"
    run = CliRunner().invoke(group, ["get", url, "-o", str(tmp_path / "file"), "--json", "-H", f"@{secret}",
                                     "--limit-rate", "100MiB", "--digest", str(Digest.of(DATA))])
    assert run.exit_code == 0, run.output
    assert hashlib.sha256(DATA).hexdigest() in run.stdout
    for words in (["get", "ftp://h/x"], ["get", url, "-H", "nonsense"], ["get", url, "--digest", "md5:1"],
                  ["get", f"http://{server.host}/"], ["get", url, "--limit-rate", "fast"]):
        assert isinstance(CliRunner().invoke(group, words).exception, LazyfsError), words


# --- through the mirror ---

@pytest.mark.trio
async def test_a_second_get_costs_the_server_no_bytes(server: WebServer, tmp_path: Path) -> None:
    url = f"http://{server.host}{PATH}"
    async with mirror_beside(tmp_path, proxy_hosts=(server.host,)) as mirror:
        for name in ("one", "two"):
            got = await get_async(url, tmp_path / name, mirror)
            assert (got.by, (tmp_path / name).read_bytes() == DATA) == ("mirror", True)
        assert server.body_bytes == len(DATA)
        server.etags[PATH], server.files[PATH] = '"two"', DATA[::-1]
        await get_async(url, tmp_path / "one", mirror)
        assert (tmp_path / "one").read_bytes() == DATA[::-1]


@pytest.mark.trio
async def test_a_get_that_the_mirror_may_not_do_is_done_without_it(server: WebServer, tmp_path: Path) -> None:
    async with mirror_beside(tmp_path) as mirror:
        got = await get_async(f"http://{server.host}{PATH}", tmp_path / "file", mirror)
        assert got.by == "origin"
        with pytest.raises(NotFoundError):
            await get_async(f"http://{server.host}/none", tmp_path / "file", mirror)
        status, _, _ = await ask(mirror, f"GET /url/http://{server.host}{PATH} HTTP/1.1\nHost: x\n")
        assert status == 403   # a web page's request: without the header


@pytest.mark.trio
async def test_what_needs_credentials_is_not_kept_unless_its_digest_is_known(server: WebServer,
                                                                             tmp_path: Path) -> None:
    server.secret = "Bearer x"
    url, headers = f"http://{server.host}{PATH}", {"authorization": "Bearer x"}
    async with mirror_beside(tmp_path, proxy_hosts=(server.host,)) as mirror:
        await get_async(url, tmp_path / "file", mirror, headers=headers)
        assert not list((tmp_path / "mirror/pieces").rglob("file-*"))
        await get_async(url, tmp_path / "file", mirror, headers=headers, digest=Digest.of(DATA))
        assert list((tmp_path / "mirror/pieces/whole").glob("file-*"))
        with pytest.raises(LazyfsError):    # who knows the digest, but may not have the file
            await get_async(url, tmp_path / "file2", mirror, digest=Digest.of(DATA))


@pytest.mark.trio
async def test_the_proxy_keeps_what_rules_name_and_passes_on_the_rest(server: WebServer, tmp_path: Path) -> None:
    server.files["/other"] = b"other"
    base = f"http://{server.host}"
    async with mirror_beside(tmp_path, proxy_hosts=(server.host,), proxy=("/models/",),
                             proxy_immutable=(r"/models/.*\.whl$",)) as mirror:
        request = f"GET {base}{PATH} HTTP/1.1\nHost: {server.host}\n"
        status, headers, body = await ask(mirror, request)
        assert (status, headers["etag"], body == DATA) == (200, '"one"', True)
        status, headers, body = await ask(mirror, request + "Range: bytes=1000000-1000009\n")
        assert (status, headers["content-range"], body) == (206, f"bytes 1000000-1000009/{len(DATA)}",
                                                            DATA[1000000:1000010])
        assert (await ask(mirror, request + "Range: bytes=99999999-\n"))[0] == 416
        assert (await ask(mirror, request + 'If-None-Match: "one"\n'))[0] == 304
        status, headers, body = await ask(mirror, request.replace("GET", "HEAD"))
        assert (status, headers["content-length"], body) == (200, str(len(DATA)), b"")
        assert server.count("GET") == 1
        assert (await ask(mirror, f"GET {base}/other HTTP/1.1\nHost: x\n"))[2] == b"other"
        assert (await ask(mirror, f"GET {base}/none HTTP/1.1\nHost: x\n"))[0] == 404
        server.files["/models/a.whl"] = b"wheel" * 1000
        for _ in range(3):
            assert (await ask(mirror, f"GET {base}/models/a.whl HTTP/1.1\nHost: x\n"))[2] == b"wheel" * 1000
        assert sum(path == "/models/a.whl" for _, path, _ in server.asked) == 2   # HEAD, GET


@pytest.mark.trio
async def test_the_proxy_goes_nowhere_near_this_machine_unasked(server: WebServer, tmp_path: Path) -> None:
    async with mirror_beside(tmp_path, proxy=(".",)) as mirror:
        for url in (f"http://{server.host}{PATH}", "http://169.254.169.254/latest/meta-data/", f"http://{mirror}/v2/"):
            status, _, body = await ask(mirror, f"GET {url} HTTP/1.1\nHost: x\n")
            assert (status, b"may not send us there" in body) == (502, True), body
        status, _, _ = await ask(mirror, f"CONNECT {server.host} HTTP/1.1\nHost: {server.host}\n")
        assert status == 403
    assert server.asked == []


@pytest.mark.trio
async def test_a_tunnel_to_a_place_that_is_allowed(server: WebServer, tmp_path: Path) -> None:
    async with mirror_beside(tmp_path, proxy_hosts=(server.host,)) as mirror:
        host, _, port = mirror.partition(":")
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(f"CONNECT {server.host} HTTP/1.1\r\nHost: {server.host}\r\n\r\n".encode())
            assert (await stream.receive_some(1000)).startswith(b"HTTP/1.1 200")
            await stream.send_all(f"GET {PATH} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            data = b"".join([part async for part in stream])
        assert data.endswith(DATA)
        with socket.socket() as closed:    # a port that nobody listens at
            closed.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{closed.getsockname()[1]}"
            assert (await ask(mirror, f"CONNECT {place} HTTP/1.1\nHost: x\n"))[0] == 403
