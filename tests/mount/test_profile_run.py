"""`lazyfs profile run`: what it lists, when it stops, how the program sees its container."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from lazyfs.cli.profile_run import run_command
from lazyfs.errors import LazyfsError
from lazyfs.fs import mountapi
from lazyfs.fs.drivers import BDI_DIR
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.profile.diff import compare
from lazyfs.profile.parts import profile_of
from tests.mountkit import Machine
from tests.runnerkit import FILE_BYTES, Profiler, profiled_image, require_runc, wait_said

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.mount
SERVE = "mkdir -p /www; echo hi >/www/index.html; cat /data/f2 >/dev/null; httpd -f -p 8080 -h /www & "
ASKED_FOR_THE_USER = {"etc/passwd", "etc/group"}     # by us, as any engine does
WAIT = "while :; do sleep 0.05; done"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    require_runc()
    return profiled_image(tmp_path_factory.mktemp("profiled"))


@pytest.fixture
def profiler(image: str, tmp_path: Path) -> Iterator[Profiler]:
    machine = Machine(tmp_path)
    made = Profiler(machine, image)
    yield made
    made.assert_nothing_left()


@pytest.mark.parametrize("driver", ["auto", "fuse"])
def test_the_list_is_what_the_program_read_in_order(profiler: Profiler, driver: str) -> None:
    done = profiler.run("--driver", driver)
    paths = [path for path in done.paths if path not in ASKED_FOR_THE_USER]
    assert paths[0] == "bin/busybox"
    assert paths.index("data/f3") < paths.index("data/f1")
    assert "data/f5" not in paths, "nobody asked for it"
    found = parse_prefetch(done.list_text)
    ranges = sorted(part for entry in found.entries if entry.pattern == b"data/f3" for part in entry.ranges)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == FILE_BYTES
    assert all(before[1] == after[0] for before, after in pairwise(ranges)), "all of it, in any order"
    assert found.header.image.startswith(profiler.image.rpartition(":")[0] + "@sha256:")
    assert found.header.tool.startswith("lazyfs ")


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_a_page_that_was_read_is_listed_and_not_its_neighbours(profiler: Profiler, driver: str) -> None:
    script = "dd if=/data/f3 of=/dev/null bs=4096 skip=5 count=1; dd if=/data/f3 of=/dev/null bs=4096 skip=1 count=1"
    found = parse_prefetch(profiler.run("--driver", driver, "--", "sh", "-c", script).list_text)
    entries = [entry for entry in found.entries if entry.pattern == b"data/f3"]
    assert [part for entry in entries for part in entry.ranges] == [(20480, 24576), (4096, 8192)]
    times = [entry.first_ms for entry in found.entries if entry.first_ms is not None]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] < 60_000


def test_several_runs_see_the_same_though_all_is_cached(profiler: Profiler) -> None:
    cache = profiler.machine.cache
    words = ("--cache-dir", cache, "--", "sh", "-c", "cat /data/* /etc/passwd /etc/group >/dev/null")
    first = profiler.run(*words)
    assert {f"data/f{number}" for number in range(6)} <= set(first.paths)
    target = profiler.machine.directory / "report.prefetch"
    done = profiler.run("--runs", "2", "--output", target, "--json", *words)
    report = json.loads(done.list_text)
    again = parse_prefetch(target.read_text())
    assert again.header.runs == 2
    assert {entry.share for entry in again.entries} == {1.0}
    difference = compare(profile_of(parse_prefetch(first.list_text)), profile_of(again))
    assert difference.agreement == 1.0
    assert (difference.order or 0) > 0.9, "what is read at the same time may come in any order"
    assert [run["exitCode"] for run in report["runs"]] == [0, 0]
    assert report["list"] == str(target)


@pytest.mark.parametrize("driver", ["erofs", "fuse"])
def test_the_kernel_reads_nothing_ahead_while_it_is_recorded(profiler: Profiler, driver: str) -> None:
    words = ("--driver", driver, "--until-log", "never", "--", "sh", "-c", "echo up; " + WAIT)
    with profiler.start(*words) as process:
        wait_said(process, "| up")
        (path,) = profiler.machine.run_dir.glob("*/mounts/*.json")
        record = json.loads(path.read_bytes())
        mounted = mountapi.mount_at(record["target"])
        assert mounted is not None
        names = record["bdi_names"] or [mounted.device]
        found = {(BDI_DIR / name / "read_ahead_kb").read_text().strip() for name in names}
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert "4" in found, "one page: what is recorded was asked for"   # others may mount in the same moment


def test_until_a_port_is_open(profiler: Profiler) -> None:
    done = profiler.run("--until-port", "8080", "--", "sh", "-c", SERVE + WAIT)
    assert "port 8080 is open" in done.said
    assert "data/f2" in done.paths


def test_until_a_url_answers(profiler: Profiler) -> None:
    done = profiler.run("--until-http", "http://localhost:8080/index.html", "--", "sh", "-c", SERVE + WAIT)
    assert "answers 200" in done.said


def test_a_url_that_answers_with_an_error_is_not_ready(profiler: Profiler) -> None:
    done = profiler.run("--until-http", "http://localhost:8080/none", "--timeout", "1.5s", "--",
                        "sh", "-c", SERVE + WAIT, code=61)
    assert "did not become ready within 1.5 s" in done.said
    assert not done.list_text


def test_until_the_output_matches_and_what_it_reads_to_end_is_not_listed(profiler: Profiler) -> None:
    script = "trap 'cat /data/f5; exit' TERM; cat /data/f0 >/dev/null; echo it is re''ady >&2; " + WAIT
    done = profiler.run("--until-log", "is ready$", "--", "sh", "-c", script)
    assert "it is ready" in done.program
    assert "data/f0" in done.paths
    assert "data/f5" not in done.paths


def test_for_some_time(profiler: Profiler) -> None:
    done = profiler.run("--for", "500ms", "--", "sleep", "100")
    assert "0.5 s are over" in done.said
    assert "bin/busybox" in done.paths


def test_a_program_that_ends_before_it_is_ready(profiler: Profiler) -> None:
    done = profiler.run("--until-port", "80", "--", "true", code=61)
    assert "before its stop rule was met" in done.said


def test_a_program_that_never_ends_needs_a_rule(profiler: Profiler) -> None:
    done = profiler.run("--timeout", "300ms", "--", "sleep", "100", code=61)
    assert "a server never ends: name a stop rule" in done.said


def test_a_program_that_fails_gives_no_list_unless_asked_to(profiler: Profiler) -> None:
    target = profiler.machine.directory / "list"
    words = ("-o", target, "--", "sh", "-c", "cat /data/f0 >/dev/null; echo oh no; exit 3")
    done = profiler.run(*words, code=60)
    assert "exit code 3" in done.said
    assert "oh no" in done.program
    assert not target.exists()
    done = profiler.run("--keep-failed", *words)
    assert "kept" in done.said
    assert b"data/f0" in [entry.pattern for entry in parse_prefetch(target.read_text()).entries]


def test_a_program_that_is_not_there(profiler: Profiler) -> None:
    done = profiler.run("--", "/bin/none", code=60)
    assert "could not be started" in done.said
    assert "/bin/none" in done.said


def test_how_the_program_sees_its_container(profiler: Profiler) -> None:
    shared = profiler.machine.directory / "shared"
    shared.mkdir()
    (shared / "given").write_text("by the host\n")
    script = ("id; pwd; echo $A $B $SECRET; cat /given/given; ls /sys/class/net /dev; cat /etc/hosts;"
              "echo x >/data/new || echo data is read-only; echo x >/given/more; sleep 0")
    mount = f"type=bind,src={shared},dst=/given,ro"
    done = profiler.run("--user", "app", "--workdir", "/data", "--env", "B=user", "--env", "SECRET", "--mount", mount,
                        "--", "sh", "-c", script, environment={"SECRET": "from here"})
    assert "uid=1000(app) gid=1001(app) groups=44(video)" in done.program
    assert "/data" in done.program
    assert "image user from here" in done.program
    assert "by the host" in done.program
    assert "127.0.0.1\tlocalhost" in done.program
    assert [line for line in done.program if line.startswith(("eth", "en", "lo"))] == ["lo"]
    assert not (shared / "more").exists()
    assert "data is read-only" in done.program, "it is of another user"
    assert done.said.count("from here") == 1, "a secret is shown by nobody but the program"


def test_lines_of_the_output_and_of_the_errors_stay_whole(profiler: Profiler) -> None:
    script = "printf 'an error ' >&2; echo a word; sleep 0.2; echo in two pieces >&2; printf 'no end'"
    program = profiler.run("--", "sh", "-c", script).program
    assert sorted(program) == ["a word", "an error in two pieces", "no end"]


def test_host_network(profiler: Profiler) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = str(server.getsockname()[1])
        words = ("--net", "host", "--until-port", port, "--", "sh", "-c", f"mkdir /www; httpd -f -p 127.0.0.1:{port}")
        assert "somebody else listens" in profiler.run(*words, code=42).said
    assert f"port {port} is open" in profiler.run(*words).said


@pytest.mark.parametrize(("words", "text"), [
    (("--until-log", "("), "no regular expression"), (("--for", "x"), "duration"), (("--env", "NOT_THERE"), "no such"),
    (("--json",), "standard output"), (("-o", "/not/there/list"), "no such directory"),
    (("--until-exit", "--for", "1s"), "--until-exit"), (("--for", "2m", "--timeout", "1m"), "longer"),
    (("--workdir", "data"), "absolute"), (("--entrypoint", ""), "names no program")])
def test_words_that_are_off(image: str, words: tuple[str, ...], text: str) -> None:
    with pytest.raises(LazyfsError, match=text) as caught:
        run_command.main([image, *words], standalone_mode=False)
    assert caught.value.exit_code in {2, 41}


def test_a_user_that_the_image_does_not_have(profiler: Profiler) -> None:
    assert "'nobody' is not in the image's /etc/passwd" in profiler.run("--user", "nobody", code=10).said


def test_a_busy_cache_directory_is_refused(profiler: Profiler) -> None:
    machine = profiler.machine
    target = machine.target()
    machine.mount(profiler.image, target)
    try:
        assert "in use by other lazy mounts" in profiler.run("--cache-dir", machine.cache, code=42).said
    finally:
        machine.umount(target)


def test_where_the_disk_is_an_overlay_memory_takes_what_is_written(profiler: Profiler, tmp_path: Path) -> None:
    """As in a CI job that is itself a container."""
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    mountapi.mount("overlay", str(tmp_path / "merged"), "overlay", 0, options)
    try:
        inside = Profiler(profiler.machine, profiler.image, tmp_path / "merged")
        done = inside.run("--cache-dir", tmp_path / "cache", "--", "sh", "-c", "echo new >/data/f0; cat /data/f0")
        assert done.program == ["new"]
        assert inside.left() == []
    finally:
        mountapi.unmount(str(tmp_path / "merged"))
