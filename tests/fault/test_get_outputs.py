"""`lazyfs get -o`: whatever FILE names, it gets the right bytes or nothing, and nothing else is touched."""

from __future__ import annotations

import os
import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from lazyfs.cli.main import group
from lazyfs.errors import BusyError, DiskFullError, TargetError, UsageError
from lazyfs.limits import KIB
from lazyfs.mirror.geturl import Getter, Wanted
from lazyfs.mirror.urls import Urls
from lazyfs.registry.options import RegistryOptions
from tests.urlkit import WebServer, web_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = random.Random(4).randbytes(600 * KIB)
PATH = "/one.bin"


@pytest.fixture
def server() -> Iterator[WebServer]:
    with web_server({PATH: DATA}) as running:
        yield running


def get(server: WebServer, output: Path, progress: Any = lambda size: None) -> None:
    urls = Urls(RegistryOptions())
    try:
        Getter(urls, Wanted(f"http://{server.host}{PATH}", {}), "", begun=lambda size, done: None,
               progress=progress).get(output)
    finally:
        urls.close()


def run(*words: str) -> Any:
    return CliRunner().invoke(group, ["get", *words])


@pytest.mark.parametrize("output", [".", "..", "there", "there/", "/"])
def test_a_directory_is_refused_before_anything_is_fetched(server: WebServer, tmp_path: Path, output: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(TargetError, match="is a directory"):
        get(server, tmp_path / output)
    assert server.asked == []
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_so_is_a_file_in_a_directory_that_is_not_there(server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no such directory"):
        get(server, tmp_path / "not" / "there")
    assert server.asked == []


@pytest.mark.parametrize("words", [("-o", ""), ("-o", "new/"), ("-o", "file", "--mirror", "x y/z"),
                                   ("-o", "file", "--mirror", ""), ("-o", "file", "-H", "X: \x85")])
def test_words_that_are_off_are_refused(server: WebServer, words: tuple[str, ...],
                                        monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(f"http://{server.host}{PATH}", *words)
    assert isinstance(found.exception, UsageError), found.output
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_ordinary_file_is_written_to_and_stays(server: WebServer, tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for output in (pipe, link):
        found: list[bytes] = []
        reader = threading.Thread(target=lambda into: into.append(pipe.read_bytes()), args=(found,))
        reader.start()
        get(server, output)
        reader.join(20)
        assert found == [DATA]
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "stdout"]


def test_a_link_of_ones_own_stays_and_leads_to_the_file(server: WebServer, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "file").symlink_to("disk/real")
    get(server, tmp_path / "file")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "disk" / "real").read_bytes() == DATA
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "file", "real"]


def test_a_link_of_somebody_elses_in_a_directory_for_all_is_not_followed(server: WebServer, tmp_path: Path) -> None:
    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("precious")
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / "file").symlink_to(victim)
    os.chown(shared / "file", 4711, 4711, follow_symlinks=False)
    with pytest.raises(TargetError, match="a link of somebody else's"):
        get(server, shared / "file")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("planted", ["link", "hard link", "pipe", "another's file"])
def test_what_lies_where_the_partial_file_is_to_be_is_not_used(server: WebServer, tmp_path: Path, planted: str) -> None:
    def stop(size: int) -> None:
        raise KeyboardInterrupt

    victim, shared = tmp_path / "victim", tmp_path / "shared"
    victim.write_text("precious")
    shared.mkdir()
    with pytest.raises(KeyboardInterrupt):
        get(server, shared / "file", stop)
    [part] = shared.iterdir()
    part.unlink()
    if planted == "link":
        part.symlink_to(victim)
    elif planted == "hard link":
        part.hardlink_to(victim)
    elif planted == "pipe":
        os.mkfifo(part)
    else:
        part.write_bytes(DATA[:1000])
        os.chown(part, 4711, 4711)
    with pytest.raises(TargetError, match="not a file of ours"):
        get(server, shared / "file")
    assert victim.read_text() == "precious"
    assert not (shared / "file").exists()


def test_two_at_once_do_not_write_into_each_others_file(server: WebServer, tmp_path: Path) -> None:
    errors: list[type[BaseException]] = []

    def once_more(size: int) -> None:
        if not errors:
            with pytest.raises(BusyError, match="another lazyfs get") as raised:
                get(server, tmp_path / "file")
            errors.append(raised.type)

    get(server, tmp_path / "file", once_more)
    assert errors == [BusyError]
    assert (tmp_path / "file").read_bytes() == DATA
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    get(server, tmp_path / "file")                       # the lock is gone with the first


def test_a_full_disk_is_called_that(server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError, match="No space left"):
        get(server, tmp_path / "file")
    assert not (tmp_path / "file").exists()


@pytest.mark.parametrize("validator", ["", '"one"'])
def test_bytes_of_a_version_that_nobody_can_tell_apart_are_not_gone_on_from(server: WebServer, tmp_path: Path,
                                                                            validator: str) -> None:
    def stop(size: int) -> None:
        raise KeyboardInterrupt

    server.etags[PATH] = validator
    with pytest.raises(KeyboardInterrupt):
        get(server, tmp_path / "file", stop)
    begun: list[int] = []
    server.files[PATH] = DATA if validator else DATA[::-1]
    urls = Urls(RegistryOptions())
    getter = Getter(urls, Wanted(f"http://{server.host}{PATH}", {}), "",
                    begun=lambda size, done: begun.append(done), progress=lambda size: None)
    getter.get(tmp_path / "file")
    urls.close()
    assert (begun[0] > 0) == bool(validator)
    assert (tmp_path / "file").read_bytes() == server.files[PATH]
