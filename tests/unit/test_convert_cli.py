"""The command line's frame: one clear line an error, the right exit code, quick to start."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from lazyfs import errors
from lazyfs.cli import main as frame
from lazyfs.cli.output import format_bytes

ROOT = Path(__file__).resolve().parents[2]

failure: BaseException | None = None


@click.command("mount")
def failing_command() -> None:
    if failure is not None:
        raise failure


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setitem(frame.COMMANDS, "mount", (f"{__name__}:failing_command", "fails"))
    before = signal.getsignal(signal.SIGTERM)

    def run_main(error: BaseException | None, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys.modules[__name__], "failure", error)
        with pytest.raises(SystemExit) as caught:
            frame.main([*words] or ["mount"])
        captured = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, captured.out, captured.err

    yield run_main
    signal.signal(signal.SIGTERM, before)


def lazyfs(*words: str, **keywords) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lazyfs", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60, **keywords)


def test_an_error_is_one_line_with_its_exit_code_and_hint(run) -> None:
    code, out, err = run(errors.AuthError("registry.example: not allowed", hint="docker login registry.example"))
    assert code == errors.AuthError.exit_code
    assert out == ""
    assert err == "lazyfs: error: registry.example: not allowed\nhint: docker login registry.example\n"


def test_names_from_archives_cannot_reach_the_terminal(run) -> None:
    _, _, err = run(errors.FormatError("entry 'a\nb\x1b[31m' is bad"))
    assert err == "lazyfs: error: entry 'a\\nb\\x1b[31m' is bad\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_a_full_disk(run, number: int) -> None:
    code, _, err = run(OSError(number, os.strerror(number), "/some/where"))
    assert code == errors.DiskFullError.exit_code
    assert err.startswith(f"lazyfs: error: /some/where: {os.strerror(number)}\nhint: ")


def test_other_errors_of_the_system_are_one_line(run) -> None:
    code, _, err = run(PermissionError(errno.EACCES, "Permission denied", b"/some/where"))
    assert (code, err.splitlines()[0]) == (1, "lazyfs: error: /some/where: Permission denied")


def test_a_bug_leaves_its_traceback_in_a_file(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = run(KeyError("what"))
    (path,) = tmp_path.iterdir()
    assert code == errors.BugError.exit_code
    assert str(path) in err
    assert "Traceback" not in err
    assert "Traceback" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_debug_shows_the_traceback(run) -> None:
    _, _, err = run(errors.UsageError("no"), "--debug", "mount")
    assert "Traceback" in err


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (frame.Terminated(), 143), (None, 0)])
def test_signals_have_their_exit_codes_and_say_nothing(run, error: BaseException | None, code: int) -> None:
    found, out, err = run(error)
    assert (found, out, err.strip()) == (code, "", "")


INTERRUPTED_IMPORT = """
import sys
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "lazyfs.cli.main":
            raise KeyboardInterrupt      # what ^C does there
sys.meta_path.insert(0, Interrupt())
from lazyfs.cli.entry import main
main()
"""


def test_an_interrupt_while_it_still_imports_says_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, cwd=ROOT,
                          check=False, timeout=60)
    assert (done.returncode, done.stderr) == (frame.EXIT_INTERRUPTED, "")


def test_memory_running_out_is_told(run) -> None:
    code, _, err = run(MemoryError())
    assert (code, err.splitlines()[0]) == (1, "lazyfs: error: out of memory")


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"], ["convert"], ["convert", "a", "b", "--codec", "x"],
                                   ["convert", "a", "b", "--chunk-size", "100k"], ["convert", "a", "b", "--jobs", "0"],
                                   ["convert", "oci:a", "oci:b", "--chunk-size", "2m"]])
def test_wrong_words_are_exit_code_2(words: list[str]) -> None:
    result = lazyfs(*words)
    assert result.returncode == 2
    assert result.stdout == ""
    first, second = result.stderr.splitlines()
    assert first.startswith("lazyfs: error: ")
    assert second.startswith("hint: ")


@pytest.mark.parametrize("words", [
    ["convert", "oci:a:b", "oci:c:d", "--codec", "zstd", "--level", "20"],
    ["convert", "oci:a:b", "oci:c:d", "--codec", "none", "--level", "1"],
    ["convert", "oci:a:b", "oci:c:d", "--all-platforms", "--platform", "linux/arm64"],
    ["convert", "oci:a:b", "oci:c:d", "--username", "me"],
])
def test_options_that_do_not_fit_are_usage_errors(words: list[str]) -> None:
    result = lazyfs(*words, env={key: value for key, value in os.environ.items() if key != "LAZYFS_PASSWORD"})
    assert result.returncode == errors.UsageError.exit_code, result.stderr


def test_help_names_every_command_and_imports_none() -> None:
    script = ("import sys; from lazyfs.cli import main\n"
              "try: main.main(['--help'])\n"
              "except SystemExit: pass\n"
              "print([name for name in ('rich', 'numpy', 'trio', 'urllib3', 'converter') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    for name in frame.COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_convert_help_shows_examples() -> None:
    result = lazyfs("convert", "--help")
    assert result.returncode == 0
    assert "Examples:" in result.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    script = f"{sys.executable} -m lazyfs convert --help | true; exit ${{PIPESTATUS[0]}}"
    for _ in range(5):
        result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
        assert result.stderr == ""


def test_sigterm_runs_the_clean_up(tmp_path: Path) -> None:
    (tmp_path / "slow_command.py").write_text(
        "import click, pathlib, time\n"
        "@click.command()\n"
        "def command():\n"
        "    try:\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        pathlib.Path('cleaned').touch()\n"
    )
    script = ("from lazyfs.cli import main\n"
              "main.COMMANDS['mount'] = ('slow_command:command', '')\n"
              "main.main(['mount'])")
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (143, b"")
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (439_000_000, "439 MB"),
                                            (1_670_000_000, "1.7 GB"), (5 * 10**18, "5000 PB")])
def test_sizes_are_short(size: int, text: str) -> None:
    assert format_bytes(size) == text
