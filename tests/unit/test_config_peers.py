"""Section [peers]: one line turns it on; half of it is said to be half."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from lazyfs import config

if TYPE_CHECKING:
    from pathlib import Path


def check(tmp_path: Path, text: str) -> tuple[config.Peers, list[str]]:
    file = tmp_path / "config.toml"
    file.write_text(text, encoding="utf-8")
    found, problems = config.check(str(file), {})
    return found.peers, [str(one) for one in problems]


@pytest.mark.parametrize("way", ['tracker = ["https://tracker.example:9450"]', 'static = ["10.0.0.1:9451", "[::1]:2"]',
                                 'dns = "peers.lazyfs.svc:9451"'])
def test_a_cluster_and_a_way_to_find_it_turn_peers_on(tmp_path: Path, way: str) -> None:
    peers, problems = check(tmp_path, f'[peers]\ncluster = "prod"\n{way}\n')
    assert problems == []
    assert peers.enabled


def test_without_a_cluster_there_are_none(tmp_path: Path) -> None:
    peers, problems = check(tmp_path, "")
    assert problems == []
    assert not peers.enabled


@pytest.mark.parametrize(("text", "word"), [
    ('cluster = "prod"', "peers.cluster: expected peers.tracker"),
    ('static = ["a:1"]', "expected peers.cluster"),
    ('cluster = "a b"', "peers.cluster: expected a name"),
    ('cluster = "a"\nstatic = [":1"]', "peers.static: expected a list of host:port"),
    ('cluster = "a"\nstatic = ["h:0"]', "peers.static: expected a list of host:port"),
    ('cluster = "a"\ntracker = [""]', "peers.tracker: expected a list of URLs"),
    ('cluster = "a"\ntracker = ["https://user:pw@host/"]', "peers.tracker: expected a list of URLs"),
    ('cluster = "a"\ndns = "name"', 'peers.dns: expected "host:port"'),
    ('cluster = "a"\nstatic = ["h:1"]\ncert_file = "/c"', "found no key_file and no ca_file"),
    ('cluster = "a"\nstatic = ["h:1"]\nnetwork = "edge"', 'peers.network = "edge": expected peers.tracker'),
    ('cluster = "a"\ntracker = ["http://h:1"]\nnetwork = "a b"', "peers.network: expected a name"),
])
def test_what_is_wrong_is_named(tmp_path: Path, text: str, word: str) -> None:
    _, problems = check(tmp_path, f"[peers]\n{text}\n")
    assert word in problems[0]


def test_the_environment_gives_lists_with_commas() -> None:
    found, problems = config.check(None, {"LAZYFS_CONFIG": "", "LAZYFS_PEERS_CLUSTER": "c",
                                          "LAZYFS_PEERS_STATIC": "a:1, b:2,", "LAZYFS_PEERS_TRACKER": "http://t:3"})
    assert problems == []
    assert found.peers.static == ("a:1", "b:2")
    assert found.peers.tracker == ("http://t:3",)


def test_it_travels_to_the_worker(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[peers]\ncluster = "c"\nstatic = ["a:1"]\nupload_rate = "1MB"\n', encoding="utf-8")
    found = config.load(str(file), {})
    assert config.from_plain(json.loads(json.dumps(config.to_plain(found)))).peers == found.peers
