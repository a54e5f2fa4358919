"""Record what a start reads, as a prefetch list: as users do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.kit.lazy import COMMAND, environment
from benchmarks.kit.proc import run

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.session import Session, Subject

_TIMEOUT_S = 600.0


def record_list(
    session: Session, subject: Subject, tag: str = "lazy", *convert_options: str, run_options: tuple[str, ...] = ()
) -> Path:
    """
    Run the program once from a lazy image on loopback, by `lazyfs profile run`.

    `run_options`: for `profile run`. Returns: the list's file, in the workspace; made once for each program and tag.
    """
    path = session.place.top / f"{subject.recipe.name}-{tag}-{subject.program}.prefetch"
    if path.exists():
        return path
    image = session.lazy(subject, session.near, tag, *convert_options)
    options: list[str | Path] = ["--insecure", "--quiet", *run_options, "-o", path]
    words = [COMMAND, "profile", "run", *options, image, "--", *subject.command]
    run(words, timeout_s=_TIMEOUT_S, env=environment(session.place))
    session.say(f"recorded a prefetch list of {len(path.read_text().splitlines()) - 1} lines for {subject.program}")
    return path
