"""Conversions that are killed, starved or lied to: no tag, nothing left behind, and the next run goes on."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from converter.build import convert
from converter.encode import Encoding
from converter.journal import RECORD_COUNT_MAX, Journal
from lazyfs.errors import DiskFullError, LazyfsError, SourceError, TargetError
from lazyfs.image.codec import Codec
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import LayerBlob
from lazyfs.limits import CHUNK_SIZE_DEFAULT_BYTES
from lazyfs.registry import RegistryOptions, open_destination, open_source
from tests.convertkit import OPTIONS, Layout, Lazy, run_convert
from tests.registrykit import require_registry, running_registry
from tests.tarbuilder import TarBuilder

ROOT = Path(__file__).resolve().parents[2]
PLAIN = Encoding(Codec.NONE, 0, CHUNK_SIZE_DEFAULT_BYTES)     # what start() asks for
LAYER_COUNT = 3
LAYER_BYTES = 2_000_000


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    made = Layout(tmp_path / "in")
    generator = random.Random(3)
    made.add_image("app", [TarBuilder().file(f"file{number}", generator.randbytes(LAYER_BYTES)).build()
                           for number in range(LAYER_COUNT)])
    return made


def start(layout: Layout, destination: str, tmp_path: Path, *words: str, **keywords) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "lazyfs", "convert", "--jobs", "1", "--codec", "none", "--json", *words,
               layout.reference("app"), destination]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **keywords)


def wait(process: subprocess.Popen[bytes]) -> tuple[int, bytes, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err.decode()


def finish(layout: Layout, destination: str, tmp_path: Path) -> dict:
    code, out, err = wait(start(layout, destination, tmp_path))
    assert code == 0, err
    result: dict = json.loads(out)
    return result


def tags(directory: Path) -> list[str]:
    index = directory / "index.json"
    return [entry["annotations"]["org.opencontainers.image.ref.name"]
            for entry in json.loads(index.read_text())["manifests"]] if index.exists() else []


def staging(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(".lazyfs-staging")] \
        if directory.exists() else []


def test_killed_at_any_time_no_tag_and_the_next_run_resumes(layout: Layout, tmp_path: Path) -> None:
    """One SIGKILL at each of several places on the way; places are told by what lies at the destination."""
    destination, out = f"oci:{tmp_path}/out:lazy", tmp_path / "out"
    for number in range(1, LAYER_COUNT + 1):
        process = start(layout, destination, tmp_path)
        try:
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline and process.poll() is None:
                if len(list(out.glob("blobs/sha256/*"))) >= number:
                    break
                time.sleep(0.0005)
        finally:
            process.kill()
            process.communicate()
        if process.returncode == -signal.SIGKILL:
            assert tags(out) == []
    result = finish(layout, destination, tmp_path)
    layers = result["images"][0]["layers"]
    assert sum(layer["reused"] for layer in layers) >= 1
    assert tags(out) == ["lazy"]
    assert staging(out) == []
    Lazy(destination).verify()
    fresh = run_convert(layout.reference("app"), f"oci:{tmp_path}/fresh:lazy", journal=tmp_path / "journal",
                        encoding=PLAIN)
    assert fresh.digest.text == result["digest"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_signal_cleans_up(layout: Layout, tmp_path: Path, number: signal.Signals, code: int) -> None:
    destination, out = f"oci:{tmp_path}/out:lazy", tmp_path / "out"
    process = start(layout, destination, tmp_path)
    deadline = time.monotonic() + 30
    while not staging(out) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(number)
    found, _, err = wait(process)
    assert found in (code, 0), err
    if found:
        assert err.strip() == ""
        assert tags(out) == []
    assert staging(out) == []


@pytest.mark.parametrize("limit_bytes", [1, 100_000, LAYER_BYTES - 5000, LAYER_BYTES + 100])
def test_a_file_that_may_not_grow_ends_in_one_line(layout: Layout, tmp_path: Path, limit_bytes: int) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    destination, out = f"oci:{tmp_path}/out:lazy", tmp_path / "out"
    code, _, err = wait(start(layout, destination, tmp_path, preexec_fn=limit))
    assert code not in (0, 70), err
    assert "\nlazyfs: error: " in f"\n{err}"
    assert "Traceback" not in err
    assert tags(out) == []
    assert staging(out) == []
    assert finish(layout, destination, tmp_path)["digest"]


class FailingWrites:
    """A destination whose Nth change fails, once or from then on."""

    NAMES = ("put_blob", "put_bytes", "put_document", "commit", "has_blob", "mount_blob")

    def __init__(self, destination, fail_at: int, error: BaseException, *, once: bool) -> None:
        self._destination, self._fail_at, self._error, self._once = destination, fail_at, error, once
        self._lock = threading.Lock()
        self.calls = 0

    def __getattr__(self, name: str):
        found = getattr(self._destination, name)
        if name not in self.NAMES:
            return found

        def call(*arguments):
            with self._lock:
                self.calls += 1
                failing = self.calls == self._fail_at or (self.calls > self._fail_at and not self._once)
            if failing:
                raise self._error
            return found(*arguments)

        return call


@pytest.mark.parametrize(("error", "once"), [
    (SourceError("the registry went away"), True), (SourceError("the registry went away"), False),
    (DiskFullError("no space"), False), (OSError(errno.ENOSPC, "No space left on device"), True),
])
def test_the_nth_write_fails(layout: Layout, tmp_path: Path, error: Exception, once: bool) -> None:
    seen: list[Exception] = []
    for fail_at in range(1, 100):
        out = tmp_path / f"out{fail_at}"
        source = open_source(layout.reference("app"), RegistryOptions())
        destination = FailingWrites(open_destination(f"oci:{out}:lazy", RegistryOptions()), fail_at, error, once=once)
        try:
            convert(source, destination, OPTIONS, journal=Journal(tmp_path / f"journal{fail_at}"))
        except (LazyfsError, OSError) as caught:
            seen.append(caught)
            assert tags(out) == []
        else:
            assert tags(out) == ["lazy"]
        finally:
            destination.close()
            source.close()
        assert staging(out) == []
        if destination.calls < fail_at:
            break
        assert run_convert(layout.reference("app"), f"oci:{out}:lazy", journal=tmp_path / f"journal{fail_at}").digest
    assert len(seen) >= LAYER_COUNT + 2
    assert all(one is error for one in seen)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("layer", "compress"))]


def test_a_full_file_system(layout: Layout, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * LAYER_BYTES}", "lazyfs-test", str(small)],
                             check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mounted.stderr!r}")
    try:
        code, _, err = wait(start(layout, f"oci:{small}/out:lazy", tmp_path))
        assert code == DiskFullError.exit_code, err
        problem, hint = err.splitlines()[-2:]
        assert problem.startswith(f"lazyfs: error: {small}/out")
        assert hint.startswith("hint: ")
        assert tags(small / "out") == []
        assert staging(small / "out") == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("damage", ["garbage", "other", "empty", "tail", "directory"])
def test_a_wrong_journal_never_makes_a_wrong_image(layout: Layout, tmp_path: Path, damage: str) -> None:
    journal, reference = tmp_path / "journal", layout.reference("app")
    right = run_convert(reference, f"oci:{tmp_path}/one:lazy", journal=journal)
    records = sorted(journal.iterdir())
    for number, path in enumerate(records):
        data = path.read_bytes()
        record = json.loads(data)
        if damage == "directory":
            path.unlink()
            path.mkdir()
            continue
        path.write_bytes({
            "garbage": data[: len(data) // 2] + b"\xff" + data[len(data) // 2 :],
            "other": records[(number + 1) % len(records)].read_bytes(),
            "empty": b"",
            "tail": json.dumps({**record, "tail": Digest.of(b"wrong").text}).encode(),
        }[damage])
    (tmp_path / "one/index.json").unlink()     # so that only the journal can tell
    again = run_convert(reference, f"oci:{tmp_path}/one:lazy", journal=journal)
    assert again.digest == right.digest
    assert not all(layer.reused for layer in again.images[0].layers)


def test_a_journal_that_lies_consistently_is_caught_by_the_tail(layout: Layout, tmp_path: Path) -> None:
    """A blob of another size or content under the right name: found out, converted again."""
    journal, reference = tmp_path / "journal", layout.reference("app")
    right = run_convert(reference, f"oci:{tmp_path}/one:lazy", journal=journal)
    (tmp_path / "one/index.json").unlink()
    for layer in right.images[0].layers:
        path = tmp_path / "one/blobs/sha256" / layer.blob_digest.hex
        data = path.read_bytes()
        path.write_bytes(data[:-50] + b"x" + data[-49:])
    again = run_convert(reference, f"oci:{tmp_path}/one:lazy", journal=journal)
    assert again.digest == right.digest
    assert not any(layer.reused for layer in again.images[0].layers)


def test_the_journal_is_bounded_and_optional(tmp_path: Path) -> None:
    digest = Digest.of(b"x")

    def blob(number: int) -> LayerBlob:
        return LayerBlob(digest, 500, Digest.of(str(number).encode()), digest, "o", digest, 200)

    journal = Journal(tmp_path / "journal")
    (tmp_path / "journal").mkdir()
    for number in range(RECORD_COUNT_MAX):
        (tmp_path / f"journal/{number}.json").touch()
    journal.add(blob(1), "oci:/a")
    assert len(list((tmp_path / "journal").iterdir())) <= RECORD_COUNT_MAX
    for number in range(40):
        journal.add(blob(1), f"oci:/{number}")
    found = journal.find(blob(1).source_digest, "o")
    assert found is not None
    assert (found[0], found[1][0], len(found[1])) == (blob(1), "oci:/39", 16)
    (tmp_path / "file").touch()
    Journal(tmp_path / "file" / "journal").add(blob(1), "oci:/a")     # cannot be written: no error
    assert Journal(tmp_path / "file" / "journal").find(digest, "o") is None


def test_a_destination_that_is_no_directory(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TargetError):
        run_convert(layout.reference("app"), f"oci:{tmp_path}/file:lazy", journal=tmp_path / "journal")


# --- with a registry ------------------------------------------------------------------------------------------------


def test_registry_round_trip_reuse_and_mount(layout: Layout, tmp_path: Path) -> None:
    require_registry()
    directory = run_convert(layout.reference("app"), f"oci:{tmp_path}/one:lazy", journal=tmp_path / "j0")
    with running_registry(tmp_path) as registry:
        first = run_convert(layout.reference("app"), f"docker://{registry.host}/app:lazy", journal=tmp_path / "j1")
        lazy = Lazy(f"docker://{registry.host}/app:lazy")
        lazy.verify()
        lazy.close()
        assert first.digest == directory.digest
        again = run_convert(layout.reference("app"), f"docker://{registry.host}/app:two", journal=tmp_path / "empty")
        assert again.digest == first.digest
        other = run_convert(layout.reference("app"), f"docker://{registry.host}/other/app:1", journal=tmp_path / "j1")
        assert other.digest == first.digest
        assert all(layer.reused for layer in other.images[0].layers), "mounted from the other repository"
        back = run_convert(layout.reference("app"), f"docker://{registry.host}/app:lazy", journal=tmp_path / "j1",
                           reuse=False)
        assert back.digest == first.digest


def test_a_registry_that_dies_leaves_no_tag_and_the_next_run_resumes(layout: Layout, tmp_path: Path) -> None:
    require_registry()
    options = RegistryOptions(retry_count=1, connect_timeout_s=1, io_timeout_s=2, request_deadline_s=3)
    with running_registry(tmp_path) as registry:
        destination = f"docker://{registry.host}/app:lazy"

        class StopAfterTwo:
            count = 0

            def layer_started(self, layer) -> None: ...

            def layer_read(self, layer, size_bytes: int) -> None: ...

            def layer_done(self, report) -> None:
                self.count += 1
                if self.count == 2:
                    registry.stop()

            def note(self, text: str) -> None: ...

        with pytest.raises(SourceError):
            run_convert(layout.reference("app"), destination, journal=tmp_path / "journal", registry=options,
                        events=StopAfterTwo(), jobs=1)
        registry.start()
        with pytest.raises(LazyfsError):
            Lazy(destination)
        report = run_convert(layout.reference("app"), destination, journal=tmp_path / "journal", registry=options)
        assert sum(layer.reused for layer in report.images[0].layers) >= 2
        lazy = Lazy(destination)
        lazy.verify()
        lazy.close()
