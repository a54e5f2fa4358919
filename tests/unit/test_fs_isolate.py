"""Calls in a child process: results, errors, hangs, deaths; and the mounter built on them."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

import lazyfs.errors
from lazyfs.errors import BugError, BusyError, DeadlineError, LazyfsError, RateLimitedError, TargetError
from lazyfs.fs import isolate, mounter


def add(first: int, second: int) -> int:
    return first + second


def busy() -> None:
    raise BusyError("in use", hint="wait")


def broken() -> None:
    raise ZeroDivisionError("oops")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_result_comes_back():
    assert isolate.call_isolated(add, 2, 3, timeout_s=10) == 5


def test_errors_keep_class_message_and_hint():
    with pytest.raises(BusyError, match="in use") as info:
        isolate.call_isolated(busy, timeout_s=10)
    assert info.value.hint == "wait"
    with pytest.raises(BugError, match="ZeroDivisionError: oops"):
        isolate.call_isolated(broken, timeout_s=10)
    with pytest.raises(BugError, match="died"):
        isolate.call_isolated(die, timeout_s=10)


def test_a_call_that_hangs_ends_at_its_deadline():
    with pytest.raises(DeadlineError, match="sleep"):
        isolate.call_isolated(time.sleep, 1000, timeout_s=0.2)


def test_no_children_and_no_descriptors_stay():
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        isolate.call_isolated(add, 1, 1, timeout_s=10)
        with pytest.raises(DeadlineError):
            isolate.call_isolated(time.sleep, 1000, timeout_s=0.02)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("data", [{}, {"kind": "errno"}, {"kind": "ClassVar"}, {"kind": "annotations", "message": "m"}])
def test_unknown_error_kinds_become_bugs(data: dict[str, str]):
    assert type(isolate.error_from(data)) is BugError


def test_every_error_of_the_tree_travels():
    for kind in vars(lazyfs.errors).values():
        if isinstance(kind, type) and issubclass(kind, LazyfsError):
            error = isolate.error_from(isolate.error_to(kind("text", hint="h")))
            assert (type(error), str(error), error.hint) == (kind, "text", "h")
    assert isolate.error_from(isolate.error_to(RateLimitedError("x", retry_after_s=3))).exit_code == 23


def test_the_mounter_answers_until_its_worker_goes():
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=mounter.serve, args=(theirs,))
    thread.start()
    client = mounter.MounterClient(ours)
    with pytest.raises(TargetError):
        client.call("unmount", "/nonexistent/lazyfs/test", 0, timeout_s=5)
    with pytest.raises(BugError, match="no_such_call"):
        client.call("no_such_call", timeout_s=5)
    client.close()
    thread.join(10)
    assert not thread.is_alive()


def test_a_dead_mounter_is_an_error():
    ours, theirs = socket.socketpair()
    theirs.close()
    client = mounter.MounterClient(ours)
    with pytest.raises(BugError, match="mounter"):
        client.call("unmount", "/x", 0, timeout_s=1)
    client.close()


def test_malformed_requests_get_an_answer_each():
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=mounter.serve, args=(theirs,))
    thread.start()
    with ours, ours.makefile("rwb") as stream:
        for line in (b"{}", b"[1]", b"not json", b'{"call": "unmount"}', b'{"call": ["x"], "arguments": 3}'):
            stream.write(line + b"\n")
            stream.flush()
            assert "error" in json.loads(stream.readline())
        ours.shutdown(socket.SHUT_WR)
    thread.join(10)
