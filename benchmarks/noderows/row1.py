"""Row 1: `lazyfs pull` and a small program's first output, against overlayfs: pull and run of the same program."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.figures import Figure, ratio
from benchmarks.kit.containerd import Containerd
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.lazy import trust
from benchmarks.kit.node import SNAPSHOTTER, Node, first_output_s
from benchmarks.rows.recording import record_list
from benchmarks.session import TENSORFLOW, Subject

if TYPE_CHECKING:
    from benchmarks.session import Session

TITLE = "pull and a small program's first output in the 1.5 GB image over 1 Gbit/s, against overlayfs"
_PROGRAMS = {   # numpy is the small program of the table of `image`
    "": ("numpy", ["python3", "-c", "import numpy; print('ready')"]),
}


def measure(session: Session) -> list[Figure]:
    figures = []
    for suffix, (name, command) in _PROGRAMS.items():
        subject = Subject(TENSORFLOW.recipe, name, command)
        hot = str(record_list(session, subject).rename(session.place.top / f"{name}.list"))   # one for each program
        ours, theirs, pulls, theirs_pulls = [], [], [], []
        for number in range(session.runs):
            pull_s, total_s = _whole(session, subject)
            theirs_pulls.append(pull_s)
            theirs.append(total_s)
            pull_s, total_s = _lazy(session, subject, hot)
            pulls.append(pull_s)
            ours.append(total_s)
            times = f"overlayfs {theirs[-1]:.2f} s, lazyfs {total_s:.2f} s (pull {pull_s:.2f})"
            session.say(f"{name} {number + 1}: {times}")
        target = None if suffix else 0.05
        figures.append(ratio(f"1{suffix}", name, target, ours, theirs, pull_s=pulls, theirs_pull_s=theirs_pulls))
    return figures


def _whole(session: Session, subject: Subject) -> tuple[float, float]:
    reference = session.source(subject, session.far)
    containerd = Containerd(session.place)
    drop_page_cache()
    begin = time.perf_counter()
    pull_s = containerd.pull(reference)
    first_output_s(containerd.run_words(reference, subject.command, "overlayfs"))
    total_s = time.perf_counter() - begin
    containerd.close()
    return pull_s, total_s


def _lazy(session: Session, subject: Subject, hot: str) -> tuple[float, float]:
    reference = session.lazy(subject, session.far, f"hot-{subject.program}", "--prefetch", hot)
    trust(session.place, session.far.host)
    with Node(session.place) as node:
        drop_page_cache()
        begin = time.perf_counter()
        pull_s = node.pull(reference)
        first_output_s(node.containerd.run_words(reference, subject.command, SNAPSHOTTER))
        return pull_s, time.perf_counter() - begin
