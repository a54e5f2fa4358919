"""Record what a start reads, as a prefetch list: as users do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.kit.lazy import COMMAND, environment
from benchmarks.kit.proc import run

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session, Subject

_TIMEOUT_S = 600.0


def record_list(session: Session, subject: Subject, tag: str = "lazy", *convert_options: str) -> Path:
    """
    Run the program once from a lazy image on loopback, by `lazyfs profile run`.

    Returns: the list's file, in the workspace; made once for each image and tag.
    """
    path = session.place.top / f"{subject.recipe.name}-{tag}.prefetch"
    if path.exists():
        return path
    image = session.lazy(subject, session.near, tag, *convert_options)
    words: list[str | Path] = [COMMAND, "profile", "run", "--insecure", "--quiet", "-o", path, image, "--"]
    run([*words, *subject.command], timeout_s=_TIMEOUT_S, env=environment(session.place))
    session.say(f"recorded a prefetch list of {len(path.read_text().splitlines()) - 1} lines for {subject.program}")
    return path
