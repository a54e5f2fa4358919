"""What an operator of a cluster is told when something is wrong: the reason, the next step, and no secret."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
from click.testing import CliRunner

from lazyfs import config
from lazyfs.cli.main import group
from lazyfs.doctor import Status, Subject, examine
from lazyfs.doctor.mirror import check_mirror
from lazyfs.doctor.peers import check_trackers
from lazyfs.errors import CacheError, ConfigError, PeerError, UsageError
from lazyfs.mirror.serving import opened
from lazyfs.peers.model import Member
from lazyfs.peers.reaching import reach, why_not
from lazyfs.tracker import redisstore
from tests.ports import free_port
from tests.trackerkit import redis_server, tracker
from tests.urlkit import mirror_beside

if TYPE_CHECKING:
    from pathlib import Path

@pytest.mark.trio
async def test_why_there_is_no_connection_is_said_in_the_systems_words() -> None:
    for host in ("127.0.0.1", "localhost"):
        with pytest.raises(PeerError, match="Connection refused"):
            await reach(Member("n1", f"{host}:{free_port()}"), None)
    assert why_not(trio.BrokenResourceError()) == "BrokenResourceError"


def trackers(*urls: str) -> list[tuple[Status, str, str]]:
    peers = config.Peers(cluster="prod", tracker=urls)
    return [(one.status, one.text, one.hint) for one in examine(Subject(replace(config.Config(), peers=peers)),
                                                               (check_trackers,))]


def test_the_doctor_tells_a_tracker_that_is_away_from_one_without_its_store(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redisstore, "TIMEOUT_S", 1.0)

    async def main() -> None:
        with redis_server() as redis:
            async with tracker(redis.url) as one:
                redis.stop()
                with trio.fail_after(60):
                    while not one.tracker.store.problem():       # noqa: ASYNC110 - a tracker tells nobody
                        await trio.sleep(0.05)
                found = await trio.to_thread.run_sync(trackers, one.url, f"http://127.0.0.1:{free_port()}")
        (status, text, hint), (other, why, start) = found
        assert status is other is Status.FAILED
        assert "Redis" in text
        assert "start Redis" in hint
        assert "Connection refused" in why
        assert "start lazyfs tracker" in start

    trio.run(main)


def test_a_password_that_was_put_into_a_url_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[tracker]\nredis = "redis://user:hunter2@host"\n'
                    '[peers]\ncluster = "a"\ntracker = ["http://u:hunter2@h"]\n')
    with pytest.raises(ConfigError) as raised:
        config.load(str(file))
    assert "redis://***@host" in str(raised.value)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize(("text", "words"), [
    ('[tracker]\nregistries = ["https://registry.example"]', ("tracker.registries", "hosts", "https://registry")),
    ('[peers]\ncluster = "a"\ntracker = ["x:9450"]', ("peers.tracker", "URLs", "found ['x:9450']")),
    ('[peers]\ncluster = "a"\nstatic = ["10.0.0.1"]', ("peers.static", "host:port", "found ['10.0.0.1']")),
])
def test_what_is_wrong_in_a_list_is_shown(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        config.load(str(tmp_path / "config.toml"))
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize(("host", "is_open"), [("0.0.0.0", True), ("[::]", True), ("192.0.2.1", True),
                                               ("127.0.0.1", False), ("[::1]", False), ("localhost", False)])
def test_the_doctor_tells_of_a_mirror_that_other_machines_reach(tmp_path: Path, host: str, *, is_open: bool) -> None:
    mirror = replace(config.Config().mirror, address=f"{host}:{free_port()}", dir=str(tmp_path))
    found = [one.text for one in examine(Subject(replace(config.Config(), mirror=mirror)), (check_mirror,))]
    assert any("open to other machines" in text for text in found) == is_open


@pytest.mark.trio
async def test_a_mirror_that_cannot_have_its_directory_names_its_own_key(tmp_path: Path) -> None:
    mirror = replace(config.Config().mirror, dir=str(tmp_path / "mirror"), containerd_root="")
    async with mirror_beside(tmp_path):
        with pytest.raises(CacheError) as raised:
            async with opened(replace(config.Config(), mirror=mirror)):
                pass
    assert "mirror.dir" in raised.value.hint
    assert "--cache-dir" not in raised.value.hint


@pytest.mark.parametrize("name", ["../x", "a b", "a" * 129])
def test_what_is_no_clusters_name_is_refused_before_anybody_is_asked(name: str) -> None:
    words = ["preheat", "registry.example/app:1", "--cluster", name, "--tracker", "http://127.0.0.1:1"]
    found = CliRunner().invoke(group, words).exception
    assert isinstance(found, UsageError)
    assert "--cluster" in str(found)
