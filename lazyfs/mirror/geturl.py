"""
`lazyfs get`: a file behind a URL into a file or a pipe; by the mirror of this node if one answers, else directly.

Layer: mirror; blocking. Who calls: cli.get. State: the partial file (mirror.getfile), named after what it is a part of
(URL, size, validator, digest), so that a later run goes on with it only if that is still the same thing. What becomes
FILE is complete, and has the digest that was asked for: it is renamed into place.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

from lazyfs.errors import IntegrityError, LazyfsError, SourceError
from lazyfs.image.digest import Digest
from lazyfs.limits import KIB, RETRY_COUNT_MAX
from lazyfs.mirror.files import DIGEST_HEADER
from lazyfs.mirror.getfile import is_stream, part_of, real_output, stream_into
from lazyfs.mirror.proxy import GET_HEADER, PATH
from lazyfs.mirror.urls import Looked, Target, UrlOrigin, Urls
from lazyfs.registry.addresses import Reach, printable
from lazyfs.registry.retry import wait_or_raise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_BYTES: Final = 256 * KIB
_WHOLE_S: Final = 24 * 3600.0        # of one request; who drips is left much earlier
_NAME_BYTES: Final = 200             # of FILE's name in the partial one's: file systems allow 255


@dataclass(frozen=True)
class Wanted:
    """What to get. `digest` None: the server's word is believed. `rate`: bytes/s; 0: no bound."""

    url: str
    headers: dict[str, str]
    digest: Digest | None = None
    rate: int = 0

    @property
    def shown(self) -> str:
        """For messages."""
        return printable(self.url)


@dataclass(frozen=True)
class Got:
    """What came. `by`: mirror, or origin. `resumed_bytes`: that were there already."""

    size: int
    digest: Digest
    by: str
    resumed_bytes: int


@dataclass(frozen=True)
class _Source:
    target: Target
    looked: Looked
    by: str


class Getter:
    """One file. `progress` is told of bytes, `begun` of the size (None: unknown) and of what is there already."""

    def __init__(self, urls: Urls, wanted: Wanted, mirror: str, *,
                 begun: Callable[[int | None, int], None], progress: Callable[[int], None]) -> None:
        """`mirror`: host:port; empty: do not ask any."""
        self._urls, self._wanted, self._mirror = urls, wanted, mirror
        self._begun, self._progress = begun, progress
        self._began = 0.0
        self._paced_bytes = 0

    def get(self, output: Path | None, pipe: BinaryIO | None = None) -> Got:
        """
        Into a file, or into `pipe`.

        Raises:
            NotFoundError, AuthError, SourceError: it is not to be had. IntegrityError: it is something else.
            TargetError, DiskFullError: the file cannot be written.

        """
        if output is not None:
            output = real_output(output)
        source = self._find()
        looked = source.looked
        self._began = time.monotonic()
        if output is None or is_stream(output):
            self._begun(looked.size, 0)
            with stream_into(output) if output is not None else nullcontext(pipe) as sink:
                assert sink is not None
                return self._receive(source, sink, 0)
        with part_of(output, _part_name(output, self._wanted, looked)) as file:
            done = file.tell() if self._can_go_on(looked) else 0
            if not done or looked.size is None or done > looked.size:
                file.truncate(0)
                done = 0
            self._begun(looked.size, done)
            return self._receive(source, file, done)

    def _can_go_on(self, looked: Looked) -> bool:
        """Whether what an earlier run has left is of the same bytes: somebody can tell them from others."""
        known = looked.validator or looked.digest or self._wanted.digest
        return looked.size is not None and looked.ranges and bool(known)

    def _find(self) -> _Source:
        """By the mirror if it answers and can; whatever it says against that, the server is asked itself."""
        wanted = self._wanted
        if self._mirror:
            own = {GET_HEADER: "1", **({DIGEST_HEADER: str(wanted.digest)} if wanted.digest else {})}
            target = Target(f"http://{self._mirror}{PATH}{wanted.url}", {**wanted.headers, **own}, Reach.MACHINE)
            try:
                return _Source(target, self._urls.look(target), "mirror")
            except LazyfsError:
                pass     # the server itself says best what is wrong
        target = Target(wanted.url, wanted.headers, Reach.MACHINE)
        return _Source(target, self._urls.look(target), "origin")

    def _receive(self, source: _Source, sink: BinaryIO, done: int) -> Got:
        looked, expected = source.looked, self._wanted.digest or source.looked.digest
        seen, resumed, failures = hashlib.sha256(), done, 0
        if done:
            _hash_again(sink, done, seen.update)
        while looked.size is None or done < looked.size:
            before = done
            try:
                for data in self._bytes(source, done):
                    seen.update(data)
                    sink.write(data)
                    done += len(data)
                    self._progress(len(data))
                    self._pace(len(data))
                if looked.size is None:
                    break
            except SourceError as error:
                failures = 1 if done > before else failures + 1
                if looked.size is None or not looked.ranges:
                    raise
                wait_or_raise(failures, error, time.monotonic() + _WHOLE_S, RETRY_COUNT_MAX)
                if source.by == "mirror" and failures > 1:    # it has gone, or cannot; the server may have the same
                    target = Target(self._wanted.url, self._wanted.headers, Reach.MACHINE)
                    source = _Source(target, looked, "origin")
        found = Digest(f"sha256:{seen.hexdigest()}")
        if expected is not None and found != expected:
            raise IntegrityError(f"{self._wanted.shown}: expected {expected}, found {found}",
                                 hint="the file is not the one that was meant, or the server's copy is damaged")
        return Got(done, found, source.by, resumed)

    def _bytes(self, source: _Source, done: int) -> Iterator[bytes]:
        target, looked = source.target, source.looked
        deadline = time.monotonic() + _WHOLE_S
        if looked.size is None:
            with self._urls.send(target, "GET", {}, deadline) as answer:
                if answer.status != 200:
                    raise SourceError(f"{target.where}: status {answer.status}")
                while data := answer.read(_BYTES):
                    yield data
            return
        with UrlOrigin(self._urls, target, looked).read_range(done, looked.size - done, deadline) as stream:
            while data := stream.read(_BYTES):
                yield data

    def _pace(self, size: int) -> None:
        if self._wanted.rate:
            self._paced_bytes += size
            time.sleep(max(0.0, self._began + self._paced_bytes / self._wanted.rate - time.monotonic()))


def _hash_again(file: BinaryIO, size: int, add: Callable[[bytes], None]) -> None:
    file.seek(0)
    while size and (data := file.read(min(size, _BYTES))):
        add(data)
        size -= len(data)


def _part_name(output: Path, wanted: Wanted, looked: Looked) -> str:
    what = f"{wanted.url}\n{looked.size}\n{looked.validator}\n{wanted.digest}"
    name = os.fsdecode(os.fsencode(output.name)[:_NAME_BYTES])
    return f".{name}.{hashlib.sha256(what.encode()).hexdigest()[:16]}.part"
