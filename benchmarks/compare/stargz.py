"""
stargz 0.18: its snapshotter's file system in a small program of ours (benchmarks/go/stargz), then runc on overlayfs.

The program is built when it is first needed, where there is Go (kit/goprogram.py).
The list of layers is fetched by curl, as containerd fetches a manifest. Background fetch is off: it only costs a start
time. With a list, a layer's files that a recorded start touches come first in it, and are prefetched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from benchmarks.compare.peer import Outcome, Peer, clock, listed_files, network
from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layout import blob_path
from benchmarks.kit.container import Container
from benchmarks.kit.goprogram import go_program, missing_go
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.proc import ToolError, attempt, run
from benchmarks.session import layer_digests

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.compare.cases import Case
    from benchmarks.session import Session

_LAYER_TIMEOUT_S = 900.0
_FETCH_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 20.0


class Stargz(Peer):
    """With the layers in eStargz's form; `listed`: the files of a recorded start first."""

    def __init__(self, *, listed: bool) -> None:
        self.name = "stargz-list" if listed else "stargz"
        self.about = "stargz, list of the start's files" if listed else "stargz, no prefetch"
        self._listed = listed
        self._addresses: dict[str, str] = {}

    def missing(self) -> str | None:
        return missing_go()

    def prepare(self, session: Session, case: Case) -> None:
        if case.name in self._addresses:
            return
        folder = session.place.folder("stargz-image")
        (folder / "first").write_text("\n".join(listed_files(session, case)) if self._listed else "")
        layout = session.layout(case.subject)
        repository = f"stargz/{case.subject.recipe.name}"
        layers: list[Any] = []
        for digest in layer_digests(layout, TAG):
            blob, out = blob_path(layout, digest), folder / "layer"
            words: list[str | Path] = [go_program("stargz"), "build", blob, out, folder / "first"]
            layers.append(json.loads(run(words, timeout_s=_LAYER_TIMEOUT_S).stdout))
            session.near.put_blob(repository, out)
        (folder / "spec").write_text(json.dumps(layers))
        self._addresses[case.name] = session.near.put_blob(repository, folder / "spec")
        shutil.rmtree(folder)

    def start(self, session: Session, case: Case) -> Outcome:
        folder = session.place.folder("stargz")
        tree = folder / "tree"
        tree.mkdir()
        address = f"http://{session.far_host}{self._addresses[case.name]}"
        drop_page_cache()
        with clock(session, case) as timer:
            layers = json.loads(run(["curl", "-sS", "--fail", address], timeout_s=_FETCH_TIMEOUT_S).stdout)
            reference = f"{session.far_host}/stargz/{case.subject.recipe.name}:{TAG}"
            (folder / "spec").write_text(json.dumps({"reference": reference, "layers": layers}))
            points = [tree / str(number) for number in range(len(layers))]
            process = self._mount(folder, tree)
            container = Container(session.place, ":".join(str(point) for point in reversed(points)))
            try:
                timer.image_ready()
                return timer.run(container.words(case.subject.command, network(session, case)), container.kill_words())
            finally:
                container.close()
                self._end(process, points)

    def _mount(self, folder: Path, tree: Path) -> subprocess.Popen[str]:
        """Returns when all layers are mounted, and what is to be prefetched is there."""
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [go_program("stargz"), "mount", folder / "root", folder / "spec", tree], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            process.kill()
            process.communicate()
            raise ToolError(f"stargz does not mount\n{(folder / 'log').read_text(errors='replace')[-1000:]}")
        return process

    def _end(self, process: subprocess.Popen[str], points: list[Path]) -> None:
        try:
            process.communicate(timeout=_END_TIMEOUT_S)   # closes its stdin
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        for point in points:
            if point.is_mount():
                attempt(["umount", "--lazy", point])
