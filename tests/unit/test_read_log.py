"""Reads that wait: what is kept of them, how they are counted, and their id in every line that is logged of them."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from lazyfs import logs, requestid
from lazyfs.errors import BugError, IntegrityError, NotFoundError, SourceError
from lazyfs.fs import guard, readlog
from lazyfs.fs.readlog import BOUNDS_S, ReadLog
from lazyfs.registry.options import RegistryOptions
from lazyfs.registry.transport import Call, Transport
from tests.fetchbench import bench
from tests.fetchkit import CHUNK, Request
from tests.unit.test_fs_server import serving

if TYPE_CHECKING:
    from pathlib import Path


# --- the id -----------------------------------------------------------------------------------------------------------


def test_a_request_that_is_sent_again_has_the_id_it_had() -> None:
    assert requestid.of_fuse(84) == requestid.of_fuse(84 | 1 << 63)
    assert requestid.of_fuse(84) != requestid.of_fuse(86)
    assert requestid.of_fuse(84).endswith("-42")


def test_a_forked_process_is_told_from_its_parent() -> None:
    mine = requestid.of_fuse(2)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, requestid.of_fuse(2).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as stream:
        assert stream.read() not in {mine, ""}


def test_lines_of_a_read_name_it_in_both_forms_and_others_do_not() -> None:
    record = logging.LogRecord("lazyfs.fs", logging.INFO, __file__, 1, "late", None, None)
    text, machine = logs.TextFormatter(journal=True), logs.JsonFormatter("worker")
    assert "request" not in text.format(record)
    assert "request" not in json.loads(machine.format(record))
    with requestid.during("ab-1"):
        assert text.format(record) == "<6>lazyfs.fs: late request=ab-1"
        assert json.loads(machine.format(record))["request"] == "ab-1"
    assert not requestid.current()


def test_the_registry_is_told_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def urlopen(_pool: object, _method: str, _target: str, **words: object) -> object:
        headers = words["headers"]
        assert isinstance(headers, dict)
        seen.append(headers)
        raise OSError(errno.ECONNREFUSED, "refused")

    monkeypatch.setattr("urllib3.connectionpool.HTTPConnectionPool.urlopen", urlopen)
    transport = Transport(RegistryOptions())
    for request in ("", "ab-1"):
        with requestid.during(request), pytest.raises(SourceError):
            transport.send(Call("GET", "http://127.0.0.1:1/v2/"), time.monotonic() + 5)
    transport.close()
    assert [one.get("X-Request-Id") for one in seen] == [None, "ab-1"]


# --- what is kept -----------------------------------------------------------------------------------------------------


async def _read(log: ReadLog, b: object, unique: int, offset: int, size: int) -> None:
    with log.reading(unique, 7, offset, size, os.getpid()) as trace:
        try:
            await b.read(offset, size)  # type: ignore[attr-defined]
        except SourceError as error:
            trace.error = guard.kind_of(error)


@pytest.mark.trio
async def test_a_slow_read_tells_what_it_waited_for(tmp_path: Path) -> None:
    log = ReadLog()
    log.slow_s = 0.0
    log.locate = lambda device, pid: {"image": f"of {device}", "process": pid}
    async with bench(tmp_path) as b:
        await _read(log, b, 2, CHUNK - 100, 200)
    (kept,) = log.slow_reads(0, 10)
    assert (kept["request"], kept["offset"], kept["size"], kept["over"], kept["error"]) == (
        requestid.of_fuse(2), CHUNK - 100, 200, True, "")
    assert (kept["image"], kept["process"], kept["number"]) == ("of None", os.getpid(), 1)
    assert [one["chunk"] for one in kept["chunks"]] == [0, 1]
    for one in kept["chunks"]:
        assert (one["landed"], one["server"], one["request"]) == (True, "local", kept["request"])
        assert list(one["stages"]) == ["queue", "first_byte", "transfer", "decode", "store"]
        assert 0 <= sum(one["stages"].values()) <= kept["seconds"] + 0.001
    assert json.loads(json.dumps(kept)) == kept
    assert log.slow_reads(1, 10) == []


@pytest.mark.trio
async def test_a_read_that_waits_is_seen_while_it_waits(tmp_path: Path) -> None:
    log = ReadLog()
    async with bench(tmp_path) as b:
        b.source.gate.clear()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, log, b, 2, 0, 100)
            await trio.testing.wait_all_tasks_blocked()
            (waiting,) = log.waiting_longer(0.0)
            assert log.waiting_longer(60.0) == []
            described = log.describe(waiting)
            assert (described["over"], described["chunks"][0]["landed"]) == (False, False)
            assert described["chunks"][0]["stages"] == {}
            b.source.gate.set()
    assert not log.waiting
    assert sum(log.counts) == 1


@pytest.mark.trio
async def test_errors_are_counted_by_their_kind_and_the_reason_is_kept(tmp_path: Path) -> None:
    log = ReadLog()
    log.slow_s = 0.0
    async with bench(tmp_path) as b:
        b.source.blobs.clear()
        await _read(log, b, 2, 0, 100)
    assert log.errors == {"not_found": 1}
    (kept,) = log.slow_reads(0, 10)
    assert kept["error"] == "not_found"
    assert "no blob" in kept["chunks"][0]["error"]


def test_kinds_are_names_of_classes() -> None:
    found = [guard.kind_of(error) for error in (
        NotFoundError("x"), IntegrityError("x"), BugError("x"), KeyError("x"), MemoryError(), trio.TooSlowError(),
        guard.ErrnoError(errno.ENOENT))]
    assert found == ["not_found", "integrity", "bug", "bug", "memory", "deadline", ""]


def test_times_are_counted_by_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = ReadLog()
    for took_s in (0.0005, 0.001, 0.3, 59.0, 61.0, 4000.0):
        with log.reading(2, 1, 0, 1, 0):
            now += took_s
    assert sum(log.counts) == 6
    assert {bound: count for bound, count in zip((*BOUNDS_S, "more"), log.counts, strict=True) if count} == {
        0.001: 2, 0.5: 1, 60.0: 1, "more": 2}
    assert log.seconds == pytest.approx(4120.3015)
    assert log.slow_count == 3


def test_an_outage_is_kept_in_part_and_counted_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    log = ReadLog()
    for second in range(8):
        for unique in range(500):
            with log.reading(2 * unique, 1, 0, 1, 0) as trace:
                now += 60.0 if unique == 0 else 0.0
                trace.began = now - 60.0
                trace.error = "deadline"
        assert len(log.slow_reads(0, 10_000)) == min(readlog.KEPT_COUNT, (second + 1) * readlog.TOLD_COUNT_MAX)
    assert (log.slow_count, log.errors["deadline"]) == (4000, 4000)
    numbers = [one["number"] for one in log.slow_reads(0, 10_000)]
    assert numbers == sorted(numbers)
    assert log.slow_reads(numbers[-3], 10)[0]["number"] == numbers[-2]


# --- from the kernel's request to the line in the log -----------------------------------------------------------------


@pytest.mark.trio
async def test_a_failed_read_is_named_in_the_log_by_its_request(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logs.TextFormatter(journal=True).format(record))  # type: ignore[method-assign]
    logging.getLogger("lazyfs.fs").addHandler(handler)

    def fail(_offset: int, _size: int) -> object:
        raise SourceError(f"registry is away {time.monotonic_ns()}")

    try:
        async with serving() as kernel:
            kernel.device.fail = fail
            await kernel.read(unique=84)
            assert (await kernel.answer())[1] == errno.EIO
    finally:
        logging.getLogger("lazyfs.fs").removeHandler(handler)
    (line,) = lines
    assert f"request={requestid.of_fuse(84)}" in line


@pytest.mark.trio
async def test_the_id_goes_into_the_thread_and_does_not_stay_there(tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def note(_: Request) -> None:
        seen.append((threading.current_thread().name, requestid.current()))

    log = ReadLog()
    async with bench(tmp_path) as b:
        b.source.faults.append(note)
        async with trio.open_nursery() as nursery:    # a read is a task
            nursery.start_soon(_read, log, b, 2, 0, 10)
        b.fetcher.prefetch([(b.device, 3)])
        await b.settled()
        await b.read(6 * CHUNK, 10)
    assert [request for _, request in seen] == [requestid.of_fuse(2), "", ""]
    assert all(name.startswith("lazyfs-fetch") for name, _ in seen)
