"""Systems that fetch everything first: containerd with overlayfs; an image of a file system, fetched and mounted."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from benchmarks.compare.peer import Outcome, Peer, clock, network
from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layout import Compression, recompress
from benchmarks.kit.container import Container
from benchmarks.kit.containerd import Containerd
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.proc import attempt, run

if TYPE_CHECKING:
    from benchmarks.compare.cases import Case
    from benchmarks.session import Session

_MAKE_TIMEOUT_S = 900.0
_FETCH_TIMEOUT_S = 600.0


class Overlayfs(Peer):
    """What is there today: pull, unpack, run."""

    def __init__(self, compression: Compression) -> None:
        self.name = f"overlayfs-{compression}"
        self.about = f"containerd, overlayfs, {compression} layers"
        self._compression = compression

    def prepare(self, session: Session, case: Case) -> None:
        self._image(session, case)

    def _image(self, session: Session, case: Case) -> str:
        if self._compression == "gzip":
            return session.source(case.subject, session.far)
        layout = session.place.top / f"{case.subject.recipe.name}-{self._compression}"
        if not layout.exists():
            recompress(session.layout(case.subject), layout, self._compression, TAG)
            session.near.push(layout, case.subject.recipe.name, self._compression)
        return session.far.reference(case.subject.recipe.name, self._compression)

    def start(self, session: Session, case: Case) -> Outcome:
        reference = session.at_distance(self._image(session, case))
        containerd = Containerd(session.place)
        try:
            drop_page_cache()
            with clock(session, case) as time:
                containerd.pull(reference)
                time.image_ready()
                words = containerd.run_words(reference, case.subject.command, "overlayfs", network(session, case))
                return time.run(words, containerd.kill_words())
        finally:
            containerd.close()


class FileSystemImage(Peer):
    """The whole tree as one file, fetched by curl and mounted."""

    def __init__(self, name: str, about: str, kind: str, make: list[str]) -> None:
        """`make`: the words that make one, with FILE and TREE for what goes there."""
        self.name, self.about, self._kind, self._make = name, about, kind, make
        self._addresses: dict[str, str] = {}

    def missing(self) -> str | None:
        return None if shutil.which(self._make[0]) else f"{self._make[0]} is not installed"

    def prepare(self, session: Session, case: Case) -> None:
        name = case.subject.recipe.name
        if name in self._addresses:
            return
        file = session.place.top / f"{name}.{self.name}"
        known = {"FILE": str(file), "TREE": str(session.unpacked(case.subject))}
        run([known.get(word, word) for word in self._make], timeout_s=_MAKE_TIMEOUT_S)
        self._addresses[name] = session.near.put_blob(f"files/{name}", file)
        file.unlink()

    def start(self, session: Session, case: Case) -> Outcome:
        address = f"http://{session.far_host}{self._addresses[case.subject.recipe.name]}"
        folder = session.place.folder("whole-file")
        file, target = folder / "image", folder / "tree"
        target.mkdir()
        container = Container(session.place, target)
        drop_page_cache()
        try:
            with clock(session, case) as time:
                run(["curl", "-sS", "--fail", "-o", file, address], timeout_s=_FETCH_TIMEOUT_S)
                run(["mount", "-t", self._kind, "-o", "loop,ro", file, target], timeout_s=_FETCH_TIMEOUT_S)
                time.image_ready()
                words = container.words(case.subject.command, network(session, case))
                return time.run(words, container.kill_words())
        finally:
            container.close()
            attempt(["umount", target])
            file.unlink(missing_ok=True)


def file_system_images() -> list[FileSystemImage]:
    erofs, squashfs = ["mkfs.erofs", "--quiet"], ["mksquashfs", "TREE", "FILE", "-quiet", "-no-progress"]
    return [
        FileSystemImage("erofs", "EROFS, uncompressed, fetched whole", "erofs", [*erofs, "FILE", "TREE"]),
        FileSystemImage(
            "erofs-lz4", "EROFS, lz4hc in 64 KiB, fetched whole", "erofs",
            [*erofs, "-zlz4hc", "-C65536", "FILE", "TREE"],
        ),
        FileSystemImage(
            "squashfs", "squashfs, zstd 3 in 128 KiB, fetched whole", "squashfs",
            [*squashfs, "-comp", "zstd", "-Xcompression-level", "3"],
        ),
    ]  # fmt: skip
