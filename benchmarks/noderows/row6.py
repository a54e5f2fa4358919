"""Row 6: the daemon's start with 100 images mounted, the registry being down."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.noderows.images import many_lazy_images

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "daemon start with 100 images known, registry down"
_IMAGE_COUNT = 100
_SMALL_FILE = "etc/debian_version"


def measure(session: Session) -> list[Figure]:
    images = many_lazy_images(session, _IMAGE_COUNT)
    daemon = NodeDaemon(session.place)
    top = session.place.folder("node-mounts")
    for number, image in enumerate(images):
        daemon.mount(image, top / str(number))
        (top / str(number) / _SMALL_FILE).read_bytes()
    session.near.close()
    started, after_death = [], []
    for _ in range(session.runs):
        daemon.kill_keeper()
        started.append(daemon.start())      # finds a worker with 100 mounts, which serves on until it is replaced
        for number in range(_IMAGE_COUNT):
            assert (top / str(number) / _SMALL_FILE).read_bytes()
        after_death.append(daemon.timed(daemon.kill_worker))
    daemon.close()
    return [
        plain("6", "until a new worker has restored all of them", 2.0, "s", after_death),
        plain("6-keeper", "until a new keeper serves with the worker that it found", None, "s", started),
    ]
