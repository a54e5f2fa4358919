"""Stop rules as users write them, and the lines that a program says."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import UsageError
from lazyfs.runner.output import LINE_BYTES_MAX, Lines, printable
from lazyfs.runner.rules import StopRules, parse_duration, parse_http, parse_pattern


@pytest.mark.parametrize(("text", "seconds"), [
    ("30s", 30), ("500ms", 0.5), ("2m", 120), ("1h", 3600), ("1.5", 1.5), ("24h", 86400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "0", "0s", "-1s", "1d", "25h", "nan", "inf", "1e3", "1 h", "9" * 30])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_patterns_search_in_bytes() -> None:
    assert parse_pattern("r.ady").search(b"\xff is ready")
    assert parse_pattern("prêt").search("c'est prêt".encode())


@pytest.mark.parametrize("text", ["(", "x*", "", "a" * 1001])
def test_patterns_that_are_none_or_match_everything_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_pattern(text)


@pytest.mark.parametrize(("text", "tls", "host", "port", "path"), [
    ("http://localhost", False, "localhost", 80, "/"),
    ("https://[::1]:8443/a b?x=1 2", True, "::1", 8443, "/a%20b?x=1%202"),
    ("http://127.0.0.1:1/%41", False, "127.0.0.1", 1, "/%41"), ("http://h/\r\nX: y", False, "h", 80, "/X:%20y")])
def test_urls(text: str, tls: bool, host: str, port: int, path: str) -> None:
    found = parse_http(text)
    assert (found.tls, found.host, found.port, found.path) == (tls, host, port, path)


@pytest.mark.parametrize("text", ["", "localhost:80", "ftp://x/", "http://", "http://h:99999/", "http://[::1/"])
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_http(text)


def test_a_password_in_a_url_is_refused_and_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        parse_http("http://me:hunter2@localhost/")
    assert "hunter2" not in str(caught.value)


def test_rules_are_described() -> None:
    assert StopRules().describe() == "until the program ends"
    rules = StopRules(for_s=3, port=80, log=parse_pattern("x"), http=parse_http("http://h/"))
    assert rules.describe() == "for 3 s or until its output matches or until http://h/ answers or until port 80 is open"
    assert rules.probes
    assert not rules.until_exit
    assert StopRules().until_exit


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=10))
def test_lines_are_the_same_however_they_arrive(data: bytes, cuts: list[int]) -> None:
    lines, found = Lines(), []
    for start, end in pairwise([0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]):
        found += lines.feed(data[start:end])
    found += lines.finish()
    assert found == (data.removesuffix(b"\n").split(b"\n") if data else [])


def test_a_line_without_end_is_cut_and_memory_stays_bounded() -> None:
    lines, found = Lines(), []
    for _ in range(100):
        found += lines.feed(b"x" * LINE_BYTES_MAX)
        assert len(lines._rest) <= LINE_BYTES_MAX
    found += lines.finish()
    assert b"".join(found) == b"x" * LINE_BYTES_MAX * 100
    assert max(map(len, found)) == LINE_BYTES_MAX


def test_control_codes_are_shown_not_obeyed() -> None:
    assert printable(b"a\x1b[31m\tb\x07\xff\r") == "a\\x1b[31m\tb\\x07\\xff"


