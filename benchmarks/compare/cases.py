"""The programs that are compared, and when each of them is ready: at its first useful output, as in HelloBench."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.imagekit.recipe import NGINX, REDIS
from benchmarks.session import NUMPY, TENSORFLOW, Subject


@dataclass(frozen=True, slots=True)
class Case:
    """
    One program of one image.

    Attributes:
        subject: image and command.
        probe: words for kit.probe that wait until a service answers; none: ready at the first byte of its output.
        record_options: for `lazyfs profile run`: when the recorded start is over.

    """

    subject: Subject
    probe: tuple[str, ...] = ()
    record_options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.subject.program


_NGINX = Subject(NGINX, "nginx", ["nginx", "-g", "daemon off;"])
_REDIS = Subject(REDIS, "redis", ["redis-server", "--save", ""])

CASES = {
    case.name: case
    for case in (
        Case(Subject(NUMPY.recipe, "numpy", ["python3", "-c", "import numpy; print(numpy.ones(4).sum())"])),
        Case(_NGINX, ("http", "80"), ("--until-http", "http://127.0.0.1/")),
        Case(_REDIS, ("redis", "6379"), ("--until-port", "6379")),
        Case(TENSORFLOW),
    )
}
