"""Record what a start touches, as a prefetch list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.hotlist import make_list
from benchmarks.kit.container import Container
from benchmarks.kit.lazy import LazyMount
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session, Subject


def record_list(session: Session, subject: Subject, tag: str = "lazy", *convert_options: str) -> Path:
    """
    Start the program once from a lazy image on loopback and write down what it touched.

    Returns: the list's file, in the workspace; made once for each image and tag.
    """
    path = session.place.top / f"{subject.recipe.name}-{tag}.prefetch"
    if path.exists():
        return path
    image = session.lazy(subject, session.near, tag, *convert_options)
    mount = LazyMount(session.place, image)
    mount.mount()
    container = Container(session.place, mount.path)
    container.run(subject.command)
    touched = mount.touched()
    container.close()
    opened = open_image(MountOrder(image, str(mount.path), registry={"insecure": True}), mount.cache)
    try:
        devices = [(str(digest), table.chunk_size) for digest, table in opened.devices]
        text = make_list(opened.tree, devices, touched)
    finally:
        opened.close()
        mount.close()
    path.write_text(text)
    session.say(f"recorded a prefetch list of {len(text.splitlines()) - 1} lines for {subject.program}")
    return path
