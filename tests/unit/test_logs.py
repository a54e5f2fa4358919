"""Logs: formats and how they are chosen, and files that several processes share and rotate."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from lazyfs import config, logs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SCRIPT = """
import logging, sys
from lazyfs import config, logs
logs.setup(config.from_plain({"log": %r}).log, program="test")
log = logging.getLogger("lazyfs.test")
log.debug("not shown")
log.info("hello %%s", "you", extra={"fields": {"image": "a b", "count": 3, "password": "hunter2"}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("failed")
"""


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    """Give the process its logging back."""
    root = logging.getLogger()
    before, level, raising = list(root.handlers), root.level, logging.raiseExceptions
    yield
    for handler in list(root.handlers):
        if handler not in before:
            root.removeHandler(handler)
            handler.close()
    for handler in before:
        if handler not in root.handlers:
            root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = raising


def run(settings: dict[str, object], **options: object) -> str:
    done = subprocess.run([sys.executable, "-c", SCRIPT % settings], stderr=subprocess.PIPE, text=True, check=True,
                          **options)  # type: ignore[call-overload]
    return str(done.stderr)


def test_json_where_nobody_looks() -> None:
    first, second = map(json.loads, run({}).splitlines())
    assert first["message"] == "hello you"
    assert first["fields"] == {"image": "a b", "count": 3, "password": "***"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert (first["level"], first["logger"], first["program"]) == ("info", "lazyfs.test", "test")
    assert second["level"] == "error"
    assert "ZeroDivisionError" in second["trace"]


def test_text_on_a_terminal() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", SCRIPT % {}], stderr=theirs) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:   # the last writer is gone
                break
            if not part:
                break
            text += part
        assert process.wait(30) == 0
    os.close(ours)
    lines = text.decode().splitlines()
    assert re.fullmatch(r'\S+Z INFO lazyfs\.test: hello you image="a b" count=3 password=\*\*\*', lines[0])
    assert all(line.startswith("    ") for line in lines[2:])


def test_the_journal_gets_levels_and_no_time(tmp_path: Path) -> None:
    path = tmp_path / "stderr"
    with path.open("w") as file:
        status = os.fstat(file.fileno())
        environment = {**os.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        subprocess.run([sys.executable, "-c", SCRIPT % {}], stderr=file, check=True, env=environment)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("<6>lazyfs.test: hello you")
    assert lines[1].startswith("<3>lazyfs.test: failed")
    assert all(line.startswith("<3>    ") for line in lines[2:])


def test_what_is_configured_wins(tmp_path: Path) -> None:
    assert "INFO lazyfs.test: hello you" in run({"format": "text"})
    assert "hello" not in run({"format": "text", "level": "error"})
    assert "not shown" in run({"format": "text", "level": "debug"})
    file = tmp_path / "lazyfs.log"
    assert run({"file": str(file)}) == ""
    assert json.loads(file.read_text().splitlines()[0])["message"] == "hello you"
    assert file.stat().st_mode & 0o777 == 0o600


def make(path: Path, max_bytes: int) -> logging.Logger:
    """A logger of its own that writes to `path`."""
    logger = logging.getLogger(f"lazyfs.rotation.{id(path)}.{threading.get_ident()}.{os.urandom(4).hex()}")
    handler = logs.RotatingFile(str(path), max_bytes)
    handler.setFormatter(logs.JsonFormatter("test"))
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


def close(logger: logging.Logger) -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()


def test_files_are_bounded_in_size_and_number(tmp_path: Path) -> None:
    logger = make(tmp_path / "log", 2000)
    for number in range(200):
        logger.info("record %d", number)
    close(logger)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log", "log.1", "log.2", "log.3"]
    assert all(path.stat().st_size <= 2000 for path in tmp_path.iterdir())
    text = "".join((tmp_path / name).read_text() for name in reversed(names))
    lines = [json.loads(line)["message"] for line in text.splitlines()]
    assert lines == [f"record {number}" for number in range(200 - len(lines), 200)]


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    """Two handlers each have a descriptor of their own, as two processes have."""
    def write(name: str) -> None:
        logger = make(tmp_path / "log", 20_000)
        for number in range(100):
            logger.info("%s %d", name, number)
        close(logger)

    writers = [threading.Thread(target=write, args=(name,)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = [json.loads(line)["message"] for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert sorted(found) == sorted(f"{name} {number}" for name in "ab" for number in range(100))


def test_a_file_that_logrotate_moves_is_left(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logger = make(path, 0)
    logger.info("before")
    path.rename(tmp_path / "moved")
    logger.info("after")
    path.unlink()
    logger.info("again")
    close(logger)
    assert "before" in (tmp_path / "moved").read_text()
    assert "after" not in (tmp_path / "moved").read_text()
    assert "again" in path.read_text()


def test_a_file_that_cannot_be_written_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = make(tmp_path / "missing" / "log", 100)
    logger.info("somewhere else then")
    logger.info("%d", "not a number")
    close(logger)
    errors = capsys.readouterr().err
    assert "somewhere else then" in errors
    assert "%d" in errors


def test_setup_can_be_called_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        logs.setup(config.Log(file=str(tmp_path / name)), program="test")
        logging.getLogger("lazyfs.test").warning("to %s", name)
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("a", "b")] == [1, 1]
