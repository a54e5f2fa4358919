"""What is compared: a system that can start a program from an image that is not on the node."""

from __future__ import annotations

import select
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from benchmarks.kit.proc import ToolError, attempt
from benchmarks.rows.recording import record_list
from lazyfs.image.prefetch import literal_path, parse_prefetch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.compare.cases import Case
    from benchmarks.session import Session

_END_TIMEOUT_S = 60.0
_LOOK_S = 0.5       # whether a program that is waited for still lives
_SAID_CHARS = 2000   # of a failed program's messages


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    One cold start.

    Attributes:
        total_s: from nothing on the node to the first useful output.
        image_s: of this, until the image could be used.
        link_bytes: that crossed the link until then, both ways.

    """

    total_s: float
    image_s: float
    link_bytes: int


class Peer(ABC):
    """One system. `start` follows `prepare` of the same case, any number of times."""

    name: str
    about: str

    def missing(self) -> str | None:
        """Why it cannot run on this machine; None: it can."""
        return None

    @abstractmethod
    def prepare(self, session: Session, case: Case) -> None:
        """Have the image in the registry, in this system's own form. Not timed. Raises ToolError."""

    @abstractmethod
    def start(self, session: Session, case: Case) -> Outcome:
        """Start from nothing, and leave nothing. Raises ToolError."""


class Clock:
    """Times one start: made when it begins, page cache already cold."""

    def __init__(self, session: Session, case: Case, probe: IO[str] | None) -> None:
        self._session, self._case, self._probe = session, case, probe
        self._bytes = session.link.bytes_total()
        self._begin = time.perf_counter()
        self._image_s = 0.0

    def image_ready(self) -> None:
        """The image can be used now."""
        self._image_s = time.perf_counter() - self._begin

    def run(self, words: Sequence[str | Path], kill: Sequence[str | Path]) -> Outcome:
        """Run the program until it is ready; `kill`: the words that end it, if it does not end by itself."""
        said = self._session.place.top / "program.log"
        with said.open("wb") as errors:
            process = subprocess.Popen(
                [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors,
                start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        good = self._answered(process) if self._probe else process.stdout.read(1) != b""
        outcome = Outcome(
            time.perf_counter() - self._begin, self._image_s, self._session.link.bytes_total() - self._bytes
        )
        try:
            if self._probe:
                attempt(kill)
            process.communicate(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        if not good:
            tail = said.read_text(errors="replace")[-_SAID_CHARS:]
            raise ToolError(f"{self._case.name} was not ready in time, or said nothing\n{tail}")
        return outcome

    def _answered(self, process: subprocess.Popen[bytes]) -> bool:
        """Wait for the probe; False: it gave up, or the program ended."""
        assert self._probe is not None
        while not select.select([self._probe], [], [], _LOOK_S)[0]:
            if process.poll() is not None:
                return False
        return self._probe.readline() == "ready\n"


@contextmanager
def clock(session: Session, case: Case) -> Iterator[Clock]:
    """
    Begin a start's time, with a probe of the service already waiting.

    A service's network is the namespace at the link's far end: nothing else uses these ports there, and what the probe
    asks does not cross the link.
    """
    if not case.probe:
        yield Clock(session, case, None)
        return
    words = [*session.link.inside(), sys.executable, "-m", "benchmarks.kit.probe", *case.probe]
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as probe:
        try:
            assert probe.stdout is not None
            probe.stdout.readline()
            yield Clock(session, case, probe.stdout)
        finally:
            probe.kill()


def listed_files(session: Session, case: Case) -> list[str]:
    """The files that a recorded start touches, in order, for systems whose lists hold files and no ranges."""
    listed = record_list(session, case.subject, "lazy", run_options=case.record_options)
    entries = parse_prefetch(listed.read_bytes()).entries
    return list(dict.fromkeys((literal_path(entry.pattern) or b"").decode() for entry in entries))


def network(session: Session, case: Case) -> str | None:
    """The network namespace that a service's container is put into."""
    return session.link.netns if case.probe else None
