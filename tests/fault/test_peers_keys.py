"""The keys that tokens are signed with: a directory that is made, shared, rotated, and sometimes wrong."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import pytest

from lazyfs.errors import ConfigError
from lazyfs.peers.tokens import KEY_COUNT_MAX
from lazyfs.tracker import signing
from lazyfs.tracker.signing import SigningKeys

if TYPE_CHECKING:
    from pathlib import Path

NOW = 1_900_000_000.0


class Clock:
    """Seconds since the epoch."""

    def __init__(self) -> None:
        self.time = NOW

    def __call__(self) -> float:
        return self.time


def opened(directory: Path | None, clock: Clock, rotate_s: float = 0.0) -> SigningKeys:
    keys = SigningKeys(directory, rotate_s, clock)
    keys.load()
    return keys


@pytest.fixture(autouse=True)
def _always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "LOOK_S", 0.0)


def test_a_directory_is_made_and_the_next_tracker_has_the_same_key(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    first = opened(directory, Clock())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    (file,) = directory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert opened(directory, Clock()).current().id == first.current().id
    assert first.current().public in first.publics()
    assert opened(None, Clock()).current().id != first.current().id


def test_a_new_key_is_known_for_long_before_it_signs(tmp_path: Path) -> None:
    clock = Clock()
    keys, other = opened(tmp_path / "keys", clock, 1000.0), opened(tmp_path / "keys", clock)
    old = keys.current().id
    clock.time += 1001
    assert keys.current().id == old                  # made now
    for one in (keys, other):
        assert (len(one.publics()), one.current().id) == (2, old)
    clock.time += signing.PUBLISH_S + 1
    assert keys.current().id == other.current().id != old
    clock.time += 5 * signing.KEEP_S
    keys.current()
    clock.time += 2 * signing.KEEP_S
    keys.current()
    assert len(keys.publics()) == len(list((tmp_path / "keys").iterdir())) <= 3


def test_an_operator_rotates_by_adding_and_removing_files(tmp_path: Path) -> None:
    clock = Clock()
    directory = tmp_path / "keys"
    keys = opened(directory, clock)
    (first,) = directory.iterdir()
    old = keys.current().id
    opened(tmp_path / "other", clock)
    (added,) = (tmp_path / "other").iterdir()
    added.rename(directory / "zz.pem")
    assert (keys.current().id, len(keys.publics())) == (old, 2)
    clock.time += signing.PUBLISH_S + 1
    assert keys.current().id != old
    first.unlink()
    assert len(keys.publics()) == 1


def test_a_directory_that_becomes_wrong_changes_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    keys = opened(directory, Clock())
    known = keys.current().id
    (directory / "zz.pem").write_bytes(b"-----BEGIN")
    assert keys.current().id == known
    with pytest.raises(ConfigError):
        opened(directory, Clock())


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    directory = tmp_path / "keys"
    opened(directory, Clock())
    (file,) = directory.iterdir()
    content = file.read_bytes()
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        opened(directory, Clock())
    file.chmod(0o600)
    for data in (b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", os.urandom(100)):
        file.write_bytes(data)
        with pytest.raises(ConfigError, match="no Ed25519 key") as caught:
            opened(directory, Clock())
        assert "AAAA" not in str(caught.value)
    for number in range(KEY_COUNT_MAX + 1):
        path = directory / f"{number:03}.pem"
        path.write_bytes(content)
        path.chmod(0o600)
    file.unlink()
    with pytest.raises(ConfigError, match="expected 1 to"):
        opened(directory, Clock())
    with pytest.raises(ConfigError, match="keys_dir"):
        opened(file.parent / "000.pem" / "below", Clock())
