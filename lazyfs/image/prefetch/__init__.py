r"""
Prefetch lists: which parts of which files a start needs, in order; text that people read, edit and keep in git.

    # lazyfs-prefetch 1
    # image: registry.example/app@sha256:...
    usr/bin/python3.11
    usr/lib/libc.so.6                  0-65535,1048576- share=0.67 ms=12
    usr/lib/python3/dist-packages/**/*.py
    "opt/a file with spaces \xff"

Grammar: docs/format.md (grammar.py). Paths count from the image's root; symlinks in them are followed within the image
(find.py). Layer: lazyfs.image, no I/O. Who calls: the converter (to make the hot part), lazyfs.node (a list found
beside an image), lazyfs.profile.
"""

from __future__ import annotations

from lazyfs.image.prefetch.find import LOOKUP_STEPS, FileFinder, chunks_of, wanted_extents
from lazyfs.image.prefetch.grammar import (
    ENTRY_COUNT_MAX,
    LIST_BYTES_MAX,
    PREFETCH_VERSION,
    RUNS_MAX,
    PrefetchEntry,
    PrefetchHeader,
    PrefetchList,
    exact_pattern,
    format_entry,
    format_pattern,
    format_prefetch,
    literal_path,
    make_entry,
    parse_prefetch,
)

__all__ = [
    "ENTRY_COUNT_MAX", "LIST_BYTES_MAX", "LOOKUP_STEPS", "PREFETCH_VERSION", "RUNS_MAX", "FileFinder",
    "PrefetchEntry", "PrefetchHeader", "PrefetchList", "chunks_of", "exact_pattern", "format_entry", "format_pattern",
    "format_prefetch", "literal_path", "make_entry", "parse_prefetch", "wanted_extents",
]
