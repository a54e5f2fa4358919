"""
The directory where a daemon collects what nodes contribute: who counts, and what goes when there is too much.

    <directory>/<image key>/<contributor>.<peer>.json     a contribution as it came (profile.contribution)

Layer: node. Who calls: node.collector (adds, in a thread, one at a time), cli.profile_collected (reads). Each file is
born whole. Invariants: a contributor has one contribution an image, its newest; a peer (an address) has at most
PEER_COUNT_MAX of them, so that one machine that makes up names does not outweigh the others.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.errors import CacheError, DiskFullError, LazyfsError
from lazyfs.profile.contribution import CONTRIBUTION_BYTES_MAX, image_key, read_contribution

if TYPE_CHECKING:
    from lazyfs.profile.recording import Recording

IMAGE_COUNT_MAX = 1000           # a large registry's programs that matter
TOTAL_BYTES_MAX = 1 << 30
IMAGE_BYTES_MAX = 32 << 20       # a million touches: merging them takes some 300 MB
CONTRIBUTION_COUNT_MAX = 64      # of one image: a share is known to 2 %
PEER_COUNT_MAX = 8               # of one image; nodes behind one address share it
_KEY = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"([0-9a-f]{32})\.([0-9a-f]{16})\.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """A contribution on disk."""

    contributor: str
    peer: str
    size: int
    time_ns: int

    @property
    def name(self) -> str:
        return f"{self.contributor}.{self.peer}.json"


class Contributions:
    """Of one directory. State: what is in it, read once. `owner`: whoever adds: one process."""

    def __init__(self, directory: Path, *, owner: bool = False) -> None:
        self._directory = directory
        self.images: dict[str, dict[str, Entry]] = {}      # by key, by contributor
        with contextlib.suppress(FileNotFoundError):
            for folder in directory.iterdir():
                if _KEY.fullmatch(folder.name):
                    found = {entry.contributor: entry for entry in _entries(folder, sweep=owner)}
                    if found:
                        self.images[folder.name] = found

    def add(self, recording: Recording, data: bytes, contributor: str, peer: str) -> None:
        """
        Keep one. `data`: as it came; `contributor`: 32 hex digits; `peer`: 16.

        Raises:
            DiskFullError, CacheError: the directory cannot be written.

        """
        key = image_key(digest for digest, _ in recording.devices)
        folder = self._directory / key
        entry = Entry(contributor, peer, len(data), 0)
        temporary = folder / f"{entry.name}.tmp"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(folder / entry.name)
            entry = Entry(contributor, peer, len(data), (folder / entry.name).stat().st_mtime_ns)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else CacheError
            raise kind(f"profile.collect_dir {self._directory} cannot be written: {error.strerror}") from error
        image = self.images.setdefault(key, {})
        before = image.pop(contributor, None)
        if before is not None and before.name != entry.name:
            self._unlink(key, before)
        image[contributor] = entry
        self._trim_image(key)
        self._trim_all(key)

    def recordings(self, key: str) -> list[Recording]:
        """The contributions of an image, by contributor; what is damaged is passed over."""
        found = []
        for _, entry in sorted(self.images.get(key, {}).items()):
            with contextlib.suppress(OSError, LazyfsError):
                with (self._directory / key / entry.name).open("rb") as file:
                    data = file.read(CONTRIBUTION_BYTES_MAX + 1)
                found.append(read_contribution(data))
        return found

    def _trim_image(self, key: str) -> None:
        """The oldest goes, of the peer that has most."""
        image = self.images[key]
        while True:
            counts = Counter(entry.peer for entry in image.values())
            peer, count = counts.most_common(1)[0]
            if (count <= PEER_COUNT_MAX and len(image) <= CONTRIBUTION_COUNT_MAX
                    and (len(image) == 1 or sum(entry.size for entry in image.values()) <= IMAGE_BYTES_MAX)):
                return
            oldest = min((entry for entry in image.values() if entry.peer == peer), key=lambda entry: entry.time_ns)
            del image[oldest.contributor]
            self._unlink(key, oldest)

    def _trim_all(self, newest: str) -> None:
        """The images that the fewest contribute to go first, of these the oldest; the newest stays."""
        total = sum(entry.size for image in self.images.values() for entry in image.values())
        while len(self.images) > 1 and (len(self.images) > IMAGE_COUNT_MAX or total > TOTAL_BYTES_MAX):
            key = min((key for key in self.images if key != newest),
                      key=lambda key: (len(self.images[key]), max(one.time_ns for one in self.images[key].values())))
            for entry in self.images.pop(key).values():
                total -= entry.size
                self._unlink(key, entry)
            with contextlib.suppress(OSError):
                (self._directory / key).rmdir()

    def _unlink(self, key: str, entry: Entry) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._directory / key / entry.name).unlink()


def _entries(folder: Path, *, sweep: bool) -> list[Entry]:
    """Oldest first. `sweep`: remove what a process that was killed had half written."""
    found = []
    with contextlib.suppress(OSError):
        for one in os.scandir(folder):
            named = _NAME.fullmatch(one.name)
            if named is not None and one.is_file(follow_symlinks=False):
                status = one.stat(follow_symlinks=False)
                found.append(Entry(named[1], named[2], status.st_size, status.st_mtime_ns))
            elif sweep and one.name.endswith(".tmp"):
                Path(one.path).unlink(missing_ok=True)
    return sorted(found, key=lambda entry: entry.time_ns)
