"""The chunk cache on one machine without faults: ownership, what survives what, exact bytes, damage on disk."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lazyfs.cache import presence
from lazyfs.cache.presence import Identity, Record
from lazyfs.cache.store import CachedDevice, CacheDir
from lazyfs.errors import BugError, CacheError, CacheOwnedError
from lazyfs.image.digest import Digest

CHUNK = 64 * 1024
BOOT, LATER_BOOT = b"a" * 16, b"b" * 16
DIGEST = Digest.of(b"device")
CHUNKS = [random.Random(i).randbytes(CHUNK if i < 9 else 4096) for i in range(10)]
SIZE = 9 * CHUNK + 4096


def device(cache: CacheDir) -> CachedDevice:
    return cache.device(DIGEST, CHUNK, SIZE)


def folder(path: Path) -> Path:
    return path / "v1" / DIGEST.hex


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))    # noqa: PTH208


def fill(path: Path, indexes: list[int], *, boot_id: bytes = BOOT, checkpoint: bool = True) -> None:
    with CacheDir.open(path, boot_id=boot_id) as cache:
        cached = device(cache)
        for index in indexes:
            assert cached.write(index, CHUNKS[index])
        assert not checkpoint or cached.checkpoint()
        cached.release()


def held(path: Path, *, boot_id: bytes = BOOT) -> list[int]:
    """Which chunks a fresh start finds; checks that they are right."""
    with CacheDir.open(path, boot_id=boot_id) as cache:
        cached = device(cache)
        found = [index for index in range(10) if cached.present(index, index)]
        assert cached.missing(0, 9) == [index for index in range(10) if index not in found]
        for index in found:
            assert cached.read(index * CHUNK, len(CHUNKS[index])) == CHUNKS[index]
        assert cached.data_path.stat().st_size == SIZE
        cached.release()
    return found


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_a_chunk_is_present_once_written_and_reads_are_exact(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        assert cached.read_if_present(0, 1) is None
        assert cached.write(2, CHUNKS[2])
        assert cached.write(3, memoryview(CHUNKS[3]))
        assert cached.write(9, CHUNKS[9])
        assert cached.present(2, 3)
        assert not cached.present(1, 2)
        assert not cached.present(0, 9)
        assert cached.missing(1, 4) == [1, 4]
        assert cached.read(2 * CHUNK + 5, CHUNK) == (CHUNKS[2] + CHUNKS[3])[5 : CHUNK + 5]
        assert cached.read(9 * CHUNK, 4096) == CHUNKS[9]
        assert cached.read(0, 0) == b""
        with pytest.raises(CacheError):
            cached.read(CHUNK, 2 * CHUNK)
        assert cached.present_count == 3
        cached.release()


def test_zero_chunks_take_no_space(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        cached.mark_zeros([0, 4])
        assert cached.read(4 * CHUNK, CHUNK) == bytes(CHUNK)
        assert cached.data_path.stat().st_blocks == 0
        cached.release()


def test_complete_means_every_chunk_and_make_durable_says_so_truly(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        for index in range(9):
            cached.write(index, CHUNKS[index])
        assert not cached.complete
        assert not cached.make_durable()
        cached.write(9, CHUNKS[9])
        assert cached.complete
        assert cached.make_durable()
        assert cached.data_path.read_bytes() == b"".join(CHUNKS)
        assert cached.counters.checkpoints == 1
        assert cached.checkpoint()    # nothing new
        assert cached.counters.checkpoints == 1
        cached.release()


def test_a_device_without_chunks_is_complete(path):
    with CacheDir.open(path) as cache:
        cached = cache.device(Digest.of(b"empty"), CHUNK, 0)
        assert cached.complete
        assert cached.make_durable()
        cached.release()


def test_threads_may_write_and_read_at_once(path):
    with CacheDir.open(path, boot_id=BOOT) as cache:
        cached = device(cache)
        wrong: list[int] = []

        def work(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(300):
                index = draw.randrange(10)
                if draw.random() < 0.1:
                    cached.write(index, CHUNKS[index])
                elif (data := cached.read_if_present(index * CHUNK, 4096)) is not None and data != CHUNKS[index][:4096]:
                    wrong.append(index)
                if draw.random() < 0.02:
                    cached.checkpoint()

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        present = [index for index in range(10) if cached.present(index, index)]
        cached.release()
    assert present
    assert held(path) == present


# --- what survives ----------------------------------------------------------------------------------------------------


def test_a_restart_keeps_all_that_was_written(path):
    fill(path, [1, 2, 9], checkpoint=False)
    assert held(path) == [1, 2, 9]
    fill(path, [4], checkpoint=False)
    assert held(path) == [1, 2, 4, 9]


def test_after_a_reboot_only_the_checkpoint_counts(path):
    fill(path, [1, 2])
    fill(path, [5, 6], checkpoint=False)
    assert held(path, boot_id=LATER_BOOT) == [1, 2]
    assert held(path, boot_id=LATER_BOOT) == [1, 2]
    assert held(path, boot_id=BOOT) == [1, 2]    # the live record of the first boot is gone for good


def test_without_a_checkpoint_a_reboot_begins_anew(path):
    fill(path, [1, 2], checkpoint=False)
    assert held(path, boot_id=LATER_BOOT) == []


def test_the_kernel_names_the_boot():
    assert presence.read_boot_id() == presence.read_boot_id()
    assert len(presence.read_boot_id()) == 16


DAMAGES = ["empty", "short", "long", "flip-first", "flip-last", "gone", "directory", "fifo", "symlink", "garbage"]
# Of a data file only its size can be told without reading it all; the records are checked bit by bit.
CASES = [(name, damage) for name in ("live", "checkpoint", "data") for damage in DAMAGES
         if not (name == "data" and damage.startswith("flip"))]  # fmt: skip


def spoil(file: Path, damage: str) -> None:
    data = file.read_bytes()
    if damage in ("short", "long"):
        os.truncate(file, len(data) + (1 if damage == "long" else -1))
    elif damage.startswith("flip"):
        position = 0 if damage == "flip-first" else len(data) - 1
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x40]) + data[position + 1 :])
    elif damage in ("empty", "garbage"):
        file.write_bytes(os.urandom(len(data) + 7) if damage == "garbage" else b"")
    else:
        file.unlink()
        if damage == "directory":
            (file / "below").mkdir(parents=True)
        elif damage == "fifo":
            os.mkfifo(file)
        elif damage == "symlink":
            file.symlink_to("/dev/zero")


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_damage_means_fetching_again_and_never_an_error(path, name, damage):
    fill(path, [1, 2, 9])
    spoil(next(folder(path).glob(f"{name}*")), damage)
    boot_id = LATER_BOOT if name == "checkpoint" else BOOT
    # Without a live record the checkpoint counts; a directory in its place cannot be replaced by rename: all anew.
    expected = [1, 2, 9] if name == "live" and damage != "directory" else []
    assert held(path, boot_id=boot_id) == expected
    assert held(path, boot_id=boot_id) == expected


def test_a_record_of_another_version_or_device_is_no_record():
    identity = Identity(DIGEST, CHUNK, SIZE)
    record = Record.empty(b"12345678", 10)
    record.present[3], record.sums[3] = 1, 0x0123456789ABCDEF
    live = presence.encode_live(identity, record, BOOT)
    assert presence.decode_live(live, identity, BOOT) == record
    assert presence.decode_live(live, identity, LATER_BOOT) is None
    assert presence.decode_live(live, Identity(Digest.of(b"other"), CHUNK, SIZE), BOOT) is None
    assert presence.decode_live(live, Identity(DIGEST, CHUNK * 2, SIZE), BOOT) is None
    assert presence.decode_live(live[:8] + b"\1" + live[9:], identity, BOOT) is None
    assert presence.decode_checkpoint(live, identity) is None
    saved = presence.encode_checkpoint(identity, record)
    assert presence.decode_checkpoint(saved, identity) == record
    for position in range(len(saved)):
        spoiled = saved[:position] + bytes([saved[position] ^ 1]) + saved[position + 1 :]
        assert presence.decode_checkpoint(spoiled, identity) is None


def test_a_live_record_of_another_data_file_is_not_believed(path):
    fill(path, [1])
    live = (folder(path) / "live").read_bytes()
    next(folder(path).glob("data.*")).unlink()
    assert held(path) == []
    (folder(path) / "live").write_bytes(live)    # as a crash may leave it: old record, new data file
    assert held(path) == []


def test_leftovers_are_removed(path):
    fill(path, [1])
    (folder(path) / "checkpoint.tmp").write_bytes(b"half")
    (folder(path) / "data.0000000000000000").write_bytes(b"old")
    assert held(path) == [1]
    assert sorted(entry.name.partition(".")[0] for entry in folder(path).iterdir()) == ["checkpoint", "data", "live"]


def test_a_data_file_cut_short_while_in_use_is_noticed(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        cached.write(8, CHUNKS[8])
        os.truncate(cached.data_path, 8 * CHUNK + 100)
        assert cached.read_if_present(8 * CHUNK, CHUNK) is None
        assert not cached.present(8, 8)
        assert cached.counters.chunks_forgotten == 1
        cached.write(8, CHUNKS[8])
        assert cached.read(8 * CHUNK, CHUNK) == CHUNKS[8]
        cached.release()


# --- references -------------------------------------------------------------------------------------------------------


def test_one_object_a_device_and_files_closed_with_the_last_reference(path):
    with CacheDir.open(path) as cache:
        before = open_files()
        first, second = device(cache), device(cache)
        assert first is second
        first.retain()
        for _ in range(3):
            assert first.fd >= 0
            first.release()
        assert open_files() <= before
        assert not first.try_retain()
        third = device(cache)
        assert third is not first
        with pytest.raises(BugError):
            cache.device(DIGEST, CHUNK, SIZE + 4096)
        third.release()
        assert open_files() <= before


def test_the_directory_checkpoints_all_open_devices(path):
    with CacheDir.open(path, boot_id=BOOT) as cache:
        cached = device(cache)
        cached.write(3, CHUNKS[3])
        cache.checkpoint()
        cached.release()
    assert held(path, boot_id=LATER_BOOT) == [3]


# --- the directory ----------------------------------------------------------------------------------------------------


def test_the_directory_is_private(path):
    os.umask(os.umask(0))
    fill(path, [1])
    for entry in (path, *path.rglob("*")):
        assert entry.stat().st_mode & 0o077 == 0, entry


def test_a_second_owner_is_told_who_the_first_is(path):
    with CacheDir.open(path), pytest.raises(CacheOwnedError, match=f"process {os.getpid()}") as caught:
        CacheDir.open(path)
    assert caught.value.hint
    CacheDir.open(path).close()


def test_a_killed_owner_leaves_the_cache_free(path):
    program = """if True:
        import pathlib, sys
        from lazyfs.cache.store import CacheDir
        cache = CacheDir.open(pathlib.Path(sys.argv[1]))
        print("open", flush=True)
        sys.stdin.read()
    """
    child = subprocess.Popen([sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"open\n"
        with pytest.raises(CacheOwnedError, match=f"process {child.pid}"):
            CacheDir.open(path)
        child.kill()
        child.wait()
    CacheDir.open(path).close()


def test_an_empty_directory_is_made_private_and_a_strange_one_refused(path):
    path.mkdir(mode=0o755)
    CacheDir.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o755)    # ours, opened by someone
    CacheDir.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o700
    other = path.parent / "other"
    other.mkdir(mode=0o755)
    (other / "precious").touch()
    with pytest.raises(CacheError, match="not empty"):
        CacheDir.open(other)
    assert other.stat().st_mode & 0o777 == 0o755
    with pytest.raises(CacheError, match="not a directory"):
        CacheDir.open(other / "precious")
    with pytest.raises(CacheError):
        CacheDir.open(other / "precious" / "below")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a directory of someone else's")
def test_a_directory_of_someone_else_is_refused(path):
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)
    with pytest.raises(CacheError, match="owned by uid 12345"):
        CacheDir.open(path)


# --- taken away below us ----------------------------------------------------------------------------------------------


def test_a_directory_that_is_deleted_is_made_again_and_used_again(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        assert cached.write(1, CHUNKS[1])
        cache.tend()
        assert cached.present(1, 1), "nothing has happened"
        shutil.rmtree(path)
        assert cached.read(CHUNK, CHUNK) == CHUNKS[1], "what is open is read from what was deleted"
        assert cached.write(2, CHUNKS[2])
        cache.tend()
        assert cached.present_count == 0
        assert cached.write(3, CHUNKS[3])
        assert cached.checkpoint()
        with pytest.raises(CacheOwnedError):
            CacheDir.open(path)
        cached.release()
    assert path.stat().st_mode & 0o077 == 0
    assert held(path) == [3]


def test_a_directory_that_is_replaced_by_a_filled_one_is_taken_up(path):
    other = path.with_name("other")
    fill(other, [4, 5], boot_id=presence.read_boot_id())
    with CacheDir.open(path) as cache:
        cached = device(cache)
        assert cached.write(1, CHUNKS[1])
        path.rename(path.with_name("away"))
        other.rename(path)
        cache.tend()
        assert cached.missing(0, 9) == [0, 1, 2, 3, 6, 7, 8, 9]
        assert cached.read(4 * CHUNK, 2 * CHUNK) == CHUNKS[4] + CHUNKS[5]
        cached.release()


def test_a_directory_that_is_somebody_elses_now_is_left_alone(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        assert cached.write(1, CHUNKS[1])
        path.rename(path.with_name("away"))
        with CacheDir.open(path) as second:
            with pytest.raises(CacheOwnedError, match="in use by process"):
                cache.tend()
            with pytest.raises(CacheError, match="not ours any more"):
                device(cache)
            assert cached.read(CHUNK, CHUNK) == CHUNKS[1]
            theirs = device(second)
            assert theirs.write(7, CHUNKS[7])
            theirs.release()
        cache.tend()
        assert cached.read(7 * CHUNK, CHUNK) == CHUNKS[7]
        device(cache).release()
        cached.release()


def test_a_device_whose_files_are_deleted_begins_anew(path):
    with CacheDir.open(path) as cache:
        cached = device(cache)
        assert cached.write(1, CHUNKS[1])
        shutil.rmtree(folder(path))
        cache.tend()
        assert cached.present_count == 0
        assert cached.write(2, CHUNKS[2])
        assert cached.checkpoint()
        cached.release()
    assert held(path) == [2]


HOLDERS = [
    (b"12 daemonworker.py HOST NAMESPACE\n", "in use by process 12 (daemonworker.py)"),
    (b"12 lazyfs elsewhere 1\n", "in use by process 12 (lazyfs) on host elsewhere"),
    (b"12 lazyfs HOST 1\n", "in use by process 12 (lazyfs) of another pid namespace"),
    (b"12\n", "in use by process 12"),
    (b"", "in use by another process (it does not say which)"),
    (b"\xff\x1b[31m x\n", "in use by another process (it does not say which)"),
    (b"12 \x1b[31m x y\n", "in use by another process (it does not say which)"),
]


@pytest.mark.parametrize(("text", "expected"), HOLDERS)
def test_who_holds_it_is_said_as_far_as_it_is_known(path, text, expected):
    namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    with CacheDir.open(path):
        (path / "lock").write_bytes(
            text.replace(b"HOST", socket.gethostname().encode()).replace(b"NAMESPACE", namespace.encode()))
        with pytest.raises(CacheOwnedError) as caught:
            CacheDir.open(path)
    assert str(caught.value).endswith(expected)
