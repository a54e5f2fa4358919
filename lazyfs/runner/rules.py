"""
When a profiling run is over: the stop rules, as the user wrote them. Pure.

Layer: runner. Who calls: cli.profile_run makes them, runner.container keeps to them. The first rule that is met ends
the run; without one the program's own end does. The hard time limit is no rule: reaching it is a failure.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

from lazyfs.errors import UsageError

TIMEOUT_S_DEFAULT = 600.0
GRACE_S_DEFAULT = 10.0           # as docker stop
DURATION_S_MAX = 24 * 3600.0
PATTERN_CHARS_MAX = 1000
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)(ms|s|m|h|)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class HttpTarget:
    """Where to ask. `path`: with the query, as it goes on the request line."""

    text: str
    tls: bool
    host: str
    port: int
    path: str


@dataclass(frozen=True, slots=True)
class StopRules:
    """
    All rules of a run, and its times.

    Attributes:
        for_s: so long after the container began; None: no such rule.
        log: found in a line of the program's output.
        http: this answers with a status below 400.
        port: somebody listens on this TCP port of the container's loopback address.
        timeout_s: the run has failed then.
        grace_s: from the stop signal to SIGKILL.

    """

    for_s: float | None = None
    log: re.Pattern[bytes] | None = None
    http: HttpTarget | None = None
    port: int | None = None
    timeout_s: float = TIMEOUT_S_DEFAULT
    grace_s: float = GRACE_S_DEFAULT

    @property
    def until_exit(self) -> bool:
        """Whether nothing but the program's end ends the run."""
        return self.for_s is None and self.log is None and not self.probes

    @property
    def probes(self) -> bool:
        """Whether somebody must look into the container's network."""
        return self.http is not None or self.port is not None

    def describe(self) -> str:
        """For people."""
        words = ["until the program ends"] if self.until_exit else []
        words += [f"for {self.for_s:g} s"] if self.for_s is not None else []
        words += ["until its output matches"] if self.log is not None else []
        words += [f"until {self.http.text} answers"] if self.http is not None else []
        words += [f"until port {self.port} is open"] if self.port is not None else []
        return " or ".join(words)


def parse_duration(text: str) -> float:
    """
    30s, 500ms, 2m, 1h or plain seconds, in seconds.

    Raises:
        UsageError: something else, or not between 0 and 24 h.

    """
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _UNIT_S[found[2]] if found is not None else 0.0
    if not 0 < seconds <= DURATION_S_MAX:
        raise UsageError(f"duration {text!r:.40}: expected for example 30s, 500ms or 2m, at most 24h")
    return seconds


def parse_pattern(text: str) -> re.Pattern[bytes]:
    """A regular expression over bytes. Raises UsageError: it is none, it is too long, or it matches an empty line."""
    if len(text) > PATTERN_CHARS_MAX:
        raise UsageError(f"--until-log: a pattern of {len(text)} characters, expected at most {PATTERN_CHARS_MAX}")
    try:
        pattern = re.compile(text.encode("utf-8", "surrogateescape"))
    except re.error as error:
        raise UsageError(f"--until-log {text!r:.100} is no regular expression: {error}") from error
    if pattern.search(b""):
        raise UsageError(f"--until-log {text!r:.100} matches every line", hint="name what it says when it is ready")
    return pattern


def parse_http(text: str) -> HttpTarget:
    """A URL. Raises UsageError: not http or https, or malformed."""
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--until-http {text!r:.100}: {error}") from error
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.password:
        raise UsageError(f"--until-http {_without_secret(text)!r:.100}: expected http://HOST[:PORT]/PATH",
                         hint="for example: --until-http http://localhost:8080/healthz")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
    tls = parts.scheme == "https"
    return HttpTarget(text, tls, parts.hostname, port or (443 if tls else 80), f"{path}?{query}" if query else path)


def _without_secret(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)
