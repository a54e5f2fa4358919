"""Record what a start touches, as a prefetch list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.kit.container import Container
from benchmarks.kit.lazy import LazyMount
from lazyfs.image.prefetch import format_prefetch
from lazyfs.node.opening import open_image
from lazyfs.node.order import MountOrder
from lazyfs.profile.files import ImageFiles, profile_of_recording
from lazyfs.profile.parts import Profile, list_of
from lazyfs.profile.recording import Recording, Touch

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session, Subject
    from lazyfs.node.opening import OpenedImage


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
        text = _list(opened, touched)
    finally:
        opened.close()
        mount.close()
    path.write_text(text)
    session.say(f"recorded a prefetch list of {len(text.splitlines()) - 1} lines for {subject.program}")
    return path


def _list(opened: OpenedImage, touched: dict[str, list[int]]) -> str:
    """The worker says which chunks were touched in which order, not when: a list of whole chunks, without times."""
    devices = tuple((str(digest), table.device_size) for digest, table in opened.devices)
    touches = []
    for number, (digest, table) in enumerate(opened.devices):
        for chunk in touched.pop(str(digest), []):
            start = chunk * table.chunk_size
            touches.append(Touch(number, start, start + table.chunk_bytes(chunk), 0.0))
    files = ImageFiles(opened.tree, [table for _, table in opened.devices], [digest for digest, _ in devices])
    profile = profile_of_recording(Recording("", "", devices, ("start",), tuple(touches)), files)
    return format_prefetch(list_of(Profile(tuple(part._replace(first_ms=None) for part in profile.parts))))
