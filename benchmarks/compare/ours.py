"""lazyfs: mounted by a running daemon, then runc on overlayfs; with and without a prefetch list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.compare.peer import Outcome, Peer, clock, network
from benchmarks.kit.container import Container
from benchmarks.kit.daemon import NodeDaemon
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import trust
from benchmarks.rows.recording import record_list

if TYPE_CHECKING:
    from benchmarks.compare.cases import Case
    from benchmarks.session import Session


class Lazy(Peer):
    """A lazy image, by its own first reads alone or with a hot part."""

    def __init__(self, *, listed: bool) -> None:
        self.name = "lazyfs-list" if listed else "lazyfs"
        self.about = "lazyfs, prefetch list" if listed else "lazyfs, no prefetch list"
        self._listed = listed

    def _image(self, session: Session, case: Case) -> str:
        if not self._listed:
            return session.lazy(case.subject, session.far)
        hot = record_list(session, case.subject, "lazy", run_options=case.record_options)
        return session.lazy(case.subject, session.far, f"hot-{case.name}", "--prefetch", str(hot))

    def prepare(self, session: Session, case: Case) -> None:
        self._image(session, case)

    def start(self, session: Session, case: Case) -> Outcome:
        image = session.at_distance(self._image(session, case))
        trust(session.place, session.far_host)
        daemon = NodeDaemon(session.place)
        target = session.place.folder("node-mount")
        container = Container(session.place, target)
        try:
            drop_page_cache()
            with clock(session, case) as time:
                daemon.ask_mount(image, target)
                time.image_ready()
                words = container.words(case.subject.command, network(session, case))
                return time.run(words, container.kill_words())
        finally:
            container.close()
            daemon.close()
