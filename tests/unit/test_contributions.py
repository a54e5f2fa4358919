"""What nodes contribute: anonymous, bounded, one of many; and the directory that keeps it."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lazyfs import config
from lazyfs.errors import ConfigError, DiskFullError, FormatError, UnsupportedError
from lazyfs.node import contributions, web
from lazyfs.node.collector import PATH, Collector
from lazyfs.node.contributions import Contributions
from lazyfs.node.token import node_secret, read_token
from lazyfs.profile import contribution
from lazyfs.profile.contribution import image_key, make_contribution, read_contribution, usable
from lazyfs.profile.recording import Recording, to_json
from tests.profilekit import DEVICE_BYTES, digest, image_files, recording

DEVICES = [(digest(0), DEVICE_BYTES), (digest(1), DEVICE_BYTES), (digest(0), DEVICE_BYTES)]
ROWS = [(1, 0, 4096, 5_000, 3), (2, 4096, 8192, 6_500, 1), (0, 0, 4096, 2_000_000, 3)]


def contributed(*touches: tuple[int, int, int, float], **changes) -> Recording:
    fields = {"image": "", "containers": ("",), "devices": 2, **changes}
    return recording(touches or [(0, 0, 4096, 0.0)], **fields)


def test_it_says_nothing_of_whom_it_is_of() -> None:
    made = make_contribution("lazyfs 1", DEVICES, ROWS, 1_000_000)
    assert made is not None
    assert (made.image, made.containers) == ("", ("",))
    assert made.devices == ((digest(0), DEVICE_BYTES), (digest(1), DEVICE_BYTES))
    assert [tuple(touch) for touch in made.touches] == [(1, 0, 4096, 0.0, 0), (0, 4096, 8192, 1.5, 0)]
    assert read_contribution(to_json(made)) == made
    assert make_contribution("lazyfs 1", DEVICES, [], 1_000_000) is None


@pytest.mark.parametrize("data", [
    b"", b"{", b"[" * 100_000, b"\xff" * 100, b"x" * (contribution.CONTRIBUTION_BYTES_MAX + 1),
    to_json(contributed(image="registry.example/secret")), to_json(contributed(containers=("web",))),
    to_json(contributed(containers=("", ""))), to_json(replace(contributed(), touches=())),
    to_json(contributed((0, 0, 4096, 1e9))),
    to_json(contributed()).replace(b'"truncated"', b'"host":"node7","truncated"'),
    to_json(contributed()).replace(b"[0,0,4096,0,0]", b"[0,0,999999999,0,0]"),
    to_json(contributed()).replace(b"[0,0,4096,0,0]", b"[9,0,4096,0,0]"),
    to_json(contributed()).replace(b"[0,0,4096,0,0]", b"[0,0,4096,-1,0]"),
    to_json(contributed()).replace(digest(1).encode(), digest(0).encode()),
    to_json(contributed()).replace(digest(1).encode(), b"../../etc"),
    to_json(contributed()).replace(b'"lazyfsRecording":1', b'"lazyfsRecording":2')])
def test_hostile_ones_are_refused(data: bytes) -> None:
    with pytest.raises((FormatError, UnsupportedError)):
        read_contribution(data)


def test_more_touches_than_a_worker_notes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contribution, "CONTRIBUTION_TOUCH_COUNT_MAX", 3)
    many = [(0, 4096 * number, 4096 * number + 4096, number) for number in range(4)]
    read_contribution(to_json(contributed(*many[:3])))
    with pytest.raises(FormatError, match="4 touches"):
        read_contribution(to_json(contributed(*many)))


def test_an_image_is_known_by_its_layers_not_by_its_hot_part_or_name() -> None:
    assert image_key([digest(0), digest(1)]) == image_key([digest(0), digest(1), digest(0)])
    assert image_key([digest(0), digest(1)]) != image_key([digest(1), digest(0)])


def test_what_does_not_fit_the_image_does_not_count() -> None:
    files = image_files([("a", 0, 8192)])
    good = contributed((0, 0, 4096, 1.0), devices=1)
    wrong_size = replace(good, devices=((digest(0), DEVICE_BYTES * 2),))
    elsewhere = replace(good, devices=((digest(5), DEVICE_BYTES),))
    padding = contributed((0, 65536, 69632, 1.0), devices=1)
    found = usable([wrong_size, good, elsewhere, padding], files)
    assert [part.pattern for profile in found for part in profile.parts] == [b"a"]


def names(number: int, peer: int = 0) -> tuple[str, str]:
    return f"{number:032x}", f"{peer:016x}"


def add(store: Contributions, made: Recording, number: int, peer: int = 0) -> None:
    store.add(made, to_json(made), *names(number, peer))


def test_the_newest_of_each_contributor_is_kept_and_found_again(tmp_path: Path) -> None:
    store = Contributions(tmp_path / "new")
    first, second = contributed((0, 0, 4096, 1.0)), contributed((0, 4096, 8192, 2.0))
    add(store, first, 1)
    add(store, second, 1, peer=2)      # from another address
    add(store, first, 2)
    key = image_key(name for name, _ in first.devices)
    for one in (store, Contributions(tmp_path / "new")):
        assert one.recordings(key) == [second, first]
        assert one.recordings("0" * 64) == []
    folder = tmp_path / "new" / key
    assert len(list(folder.iterdir())) == 2
    assert oct(folder.stat().st_mode & 0o777) == "0o700"


def test_one_machine_does_not_outweigh_the_others(tmp_path: Path) -> None:
    store = Contributions(tmp_path)
    made = contributed()
    key = image_key(name for name, _ in made.devices)
    for number in range(3):
        add(store, made, number, peer=number + 1)
    for number in range(100, 100 + 3 * contributions.PEER_COUNT_MAX):
        add(store, made, number, peer=9)
    kept = [entry.peer for entry in store.images[key].values()]
    assert kept.count(names(0, 9)[1]) == contributions.PEER_COUNT_MAX
    assert len(kept) == contributions.PEER_COUNT_MAX + 3
    assert len(list((tmp_path / key).iterdir())) == len(kept)


def test_what_is_kept_is_bounded_and_what_many_have_sent_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contributions, "IMAGE_COUNT_MAX", 5)
    monkeypatch.setattr(contributions, "CONTRIBUTION_COUNT_MAX", 4)
    store = Contributions(tmp_path)
    popular = contributed()
    for number in range(10):
        add(store, popular, number, peer=number)
    for number in range(20):       # images that nobody has
        made_up = replace(popular, devices=((digest(100 + number), DEVICE_BYTES), (digest(1), DEVICE_BYTES)))
        add(store, made_up, number, peer=99)
    assert len(store.images) == 5 == len(list(tmp_path.iterdir()))
    assert len(store.images[image_key(name for name, _ in popular.devices)]) == 4
    monkeypatch.setattr(contributions, "TOTAL_BYTES_MAX", len(to_json(popular)) * 5)
    add(store, popular, 11, peer=11)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.json")) <= len(to_json(popular)) * 5
    monkeypatch.setattr(contributions, "IMAGE_BYTES_MAX", len(to_json(popular)) * 2)
    add(store, popular, 12, peer=12)
    assert len(store.images[image_key(name for name, _ in popular.devices)]) == 2


def test_what_is_damaged_or_foreign_in_the_directory_is_passed_over(tmp_path: Path) -> None:
    store = Contributions(tmp_path)
    made = contributed()
    key = image_key(name for name, _ in made.devices)
    add(store, made, 1)
    add(store, made, 2)
    (tmp_path / key / f"{names(2)[0]}.{names(2)[1]}.json").write_bytes(b"{")
    (tmp_path / key / "foreign").write_bytes(b"x")
    (tmp_path / key / "half.json.tmp").write_bytes(b"x")
    (tmp_path / "README").write_bytes(b"x")
    (tmp_path / key / f"{names(3)[0]}.{names(3)[1]}.json").symlink_to("/etc/passwd")
    reader = Contributions(tmp_path)
    assert reader.recordings(key) == [made]
    assert len(reader.images[key]) == 2
    assert (tmp_path / key / "half.json.tmp").exists(), "its writer may still be at it"
    Contributions(tmp_path, owner=True)
    assert not (tmp_path / key / "half.json.tmp").exists()


def test_a_full_disk_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Contributions(tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match="collect_dir"):
        add(store, contributed(), 1)


def test_tokens_and_secrets(tmp_path: Path) -> None:
    token = tmp_path / "token"
    for content, mode, reason in ((b"short\n", 0o600, "at least 16"), (b"t" * 32, 0o644, "others"),
                                  (b"two words and more\n", 0o600, "printable"), (b"\xff" * 32, 0o600, "printable")):
        token.write_bytes(content)
        token.chmod(mode)
        with pytest.raises(ConfigError, match=reason) as caught:
            read_token(str(token))
        assert "t" * 32 not in str(caught.value)
    token.write_bytes(b"t" * 32 + b"\nmore")
    token.chmod(0o600)
    assert read_token(str(token)).reveal() == "t" * 32
    assert "ttt" not in repr(read_token(str(token)))
    with pytest.raises(ConfigError, match="No such file"):
        read_token(str(tmp_path / "none"))
    secret = node_secret(tmp_path / "secret")
    assert node_secret(tmp_path / "secret") == secret != node_secret(tmp_path / "other")
    assert oct((tmp_path / "secret").stat().st_mode & 0o777) == "0o600"


def asked(**changes) -> web.Request:
    fields = {"method": b"POST", "target": PATH + b"0" * 32, "peer": "192.0.2.1",
              "headers": {b"authorization": b"Bearer " + b"t" * 32, b"content-length": b"10"}, **changes}
    return web.Request(**fields)


def test_who_is_let_in(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_bytes(b"t" * 32)
    token.chmod(0o600)
    now = [0.0]
    collector = Collector(config.Profile(token_file=str(token), collect_dir=str(tmp_path)), lambda: now[0])

    def status(**changes) -> int:
        answer = collector.admit(asked(**changes))
        return 0 if answer is None else answer[0]

    assert status() == 0
    assert status(target=b"/") == status(target=PATH + b"../x") == status(target=PATH + b"0" * 31) == 404
    assert status(method=b"GET") == 405
    for wrong in (b"", b"Bearer", b"Bearer " + b"u" * 32, b"Basic " + b"t" * 32, b"Bearer t", b"Bearer \xff"):
        assert status(headers={b"authorization": wrong}) == 401
    for size in (b"-1", b"1e9", b"9" * 40, b"4194305"):
        assert status(peer="192.0.2.7", headers={**asked().headers, b"content-length": size}) == 413
    many = [status(peer=f"2001:db8::{number:x}") for number in range(100)]
    assert many.count(0) == 60, "of one network of IPv6"
    assert many[-1] == 429
    assert status(peer="2001:db8:0:1::1") == 0
    now[0] += 61
    assert status(peer="2001:db8::1") == 0
    token.unlink()
    assert status() == 500


def test_the_configuration_wants_a_token_and_a_whole_key_pair(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for text, reason in (("upload = 'https://a.example'", "token_file"), ("collect = '80'", "token_file"),
                         ("cert_file = '/a'", "key_file"), ("upload = 'ftp://a'", "expected"),
                         ("upload = 'https://user:pass@a'", "expected")):
        path.write_text(f"[profile]\n{text}\n")
        assert any(reason in str(problem) for problem in config.check(str(path), {})[1]), text
    assert config.load(None, {"LAZYFS_CONFIG": os.devnull}).profile == config.Profile()
    assert (config.Profile().upload, config.Profile().collect) == ("", ""), "off unless somebody says so"


def test_mutations_of_a_contribution_never_do_more_than_be_refused() -> None:
    chance, data = random.Random(5), to_json(contributed((0, 0, 4096, 0.0), (1, 4096, 8192, 2.5)))
    for _ in range(2000):
        mutated = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        try:
            found = read_contribution(bytes(mutated))
        except FormatError:
            continue
        assert found.image == ""
        assert all(touch.end <= found.devices[touch.device][1] for touch in found.touches)
