"""Row 4: memory of all our processes on a node, with 1 and with 50 images mounted and used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.figures import Figure, plain
from benchmarks.kit.container import Container
from benchmarks.kit.node import Node
from benchmarks.noderows.images import many_lazy_images
from benchmarks.session import NUMPY

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "memory (PSS) of keeper, worker, mounter and snapshotter with 1 / 50 images mounted"
_IMAGE_COUNT = 50


def measure(session: Session) -> list[Figure]:
    images = many_lazy_images(session, _IMAGE_COUNT)
    one, many = [], []
    for _ in range(session.runs):
        with Node(session.place) as node:
            top = session.place.folder("node-mounts")
            for number, image in enumerate(images):
                target = top / str(number)
                node.daemon.mount(image, target)
                container = Container(session.place, target)
                container.run(NUMPY.command)
                container.close()
                if number == 0:
                    one.append(node.memory_mb())
            many.append(node.memory_mb())
    return [
        plain("4a", "1 image, after a program ran from it", 150.0, "MB", one),
        plain("4b", f"{_IMAGE_COUNT} images, likewise", 200.0, "MB", many),
    ]
