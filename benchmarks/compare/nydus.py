"""
nydus 2.2: nydusd alone, RAFS v6 over FUSE, data from the registry by range, then runc on overlayfs.

nydusd and nydus-image are looked for in $LAZYFS_NYDUS_DIR, then /var/tmp/lazyfs-nydus/bin, then the path:
`cargo install nydus-rs --version 2.2.0 --locked --root /var/tmp/lazyfs-nydus`. The bootstrap is fetched by curl, as its
snapshotter has containerd do. Chunks of 1 MiB and zstd, as nydusify has them; integrity is not checked while reading,
as is its default.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.compare.peer import Outcome, Peer, clock, listed_files, network
from benchmarks.kit.container import Container
from benchmarks.kit.host import drop_page_cache
from benchmarks.kit.proc import Daemon, ToolError, attempt, run

if TYPE_CHECKING:
    from benchmarks.compare.cases import Case
    from benchmarks.session import Session

_BUILT = "/var/tmp/lazyfs-nydus/bin"
_MAKE_TIMEOUT_S = 900.0
_MOUNT_TIMEOUT_S = 30.0
_FETCH_TIMEOUT_S = 120.0
_POLL_S = 0.005


@cache
def _program(name: str) -> Path | None:
    folders = [os.environ.get("LAZYFS_NYDUS_DIR", _BUILT), _BUILT, *os.get_exec_path()]
    return next((Path(folder, name) for folder in folders if os.access(Path(folder, name), os.X_OK)), None)


class Nydus(Peer):
    """With or without prefetch of the files that a recorded start touches: nydus' lists hold files, not ranges."""

    def __init__(self, *, listed: bool) -> None:
        self.name = "nydus-list" if listed else "nydus"
        self.about = "nydus, list of the start's files" if listed else "nydus, no prefetch"
        self._listed = listed
        self._addresses: dict[str, str] = {}

    def missing(self) -> str | None:
        lacking = [name for name in ("nydusd", "nydus-image") if _program(name) is None]
        return f"{' and '.join(lacking)} not found: see benchmarks/README.md" if lacking else None

    def prepare(self, session: Session, case: Case) -> None:
        if case.name in self._addresses:
            return
        folder = session.place.folder("nydus-image")
        maker = _program("nydus-image") or "nydus-image"
        words: list[str | Path] = [
            maker, "create", "--type", "dir-rafs", "--bootstrap", folder / "bootstrap",
            "--blob-dir", folder / "blobs", "--compressor", "zstd", "--chunk-size", "0x100000",
            *(["--prefetch-policy", "fs"] if self._listed else []), session.unpacked(case.subject),
        ]  # fmt: skip
        (folder / "blobs").mkdir()
        files = "".join(f"/{path}\n" for path in listed_files(session, case)) if self._listed else None
        run(words, timeout_s=_MAKE_TIMEOUT_S, stdin=files)
        for blob in (folder / "blobs").iterdir():
            session.near.put_blob(f"nydus/{case.subject.recipe.name}", blob)
        self._addresses[case.name] = session.near.put_blob(f"nydus/{case.subject.recipe.name}", folder / "bootstrap")
        shutil.rmtree(folder)

    def start(self, session: Session, case: Case) -> Outcome:
        folder = session.place.folder("nydus")
        (folder / "cache").mkdir()
        target = folder / "tree"
        target.mkdir()
        (folder / "config.json").write_text(json.dumps(self._config(session, case, folder)))
        container = Container(session.place, target)
        address = f"http://{session.far_host}{self._addresses[case.name]}"
        daemon: Daemon | None = None
        drop_page_cache()
        try:
            with clock(session, case) as timer:
                run(["curl", "-sS", "--fail", "-o", folder / "bootstrap", address], timeout_s=_FETCH_TIMEOUT_S)
                daemon = self._mount(folder, target)
                timer.image_ready()
                words = container.words(case.subject.command, network(session, case))
                return timer.run(words, container.kill_words())
        finally:
            container.close()
            attempt(["umount", "--lazy", target])
            if daemon is not None:
                daemon.close()

    def _mount(self, folder: Path, target: Path) -> Daemon:
        words: list[str | Path] = [
            _program("nydusd") or "nydusd", "--config", folder / "config.json", "--mountpoint", target, "--bootstrap",
            folder / "bootstrap", "--log-level", "warn", "--rlimit-nofile", "0",
        ]  # fmt: skip
        daemon = Daemon(words, log=folder / "log")
        limit = time.monotonic() + _MOUNT_TIMEOUT_S
        while not target.is_mount():
            daemon.check()
            if time.monotonic() > limit:
                daemon.close()
                raise ToolError("nydusd does not mount")
            time.sleep(_POLL_S)
        return daemon

    def _config(self, session: Session, case: Case, folder: Path) -> dict[str, object]:
        registry = {"scheme": "http", "host": session.far_host, "repo": f"nydus/{case.subject.recipe.name}"}
        return {
            "device": {
                "backend": {"type": "registry", "config": {**registry, "timeout": 30, "connect_timeout": 10}},
                "cache": {"type": "blobcache", "config": {"work_dir": str(folder / "cache")}},
            },
            "mode": "direct",
            "digest_validate": False,
            "enable_xattr": True,
            "fs_prefetch": {"enable": self._listed, "threads_count": 8, "merging_size": 1 << 20},
        }
