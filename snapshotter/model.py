"""
What a snapshot is, in our own words: plain values, no gRPC, no database.

Layer: snapshotter, below all else of it. Who uses it: every module of this package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

LABEL_BYTES_MAX = 4096           # key and value together; containerd's own limit (pkg/labels)
LABEL_REF = "containerd.io/snapshot.ref"                  # an unpacker prepares this chain id
LABEL_PREFIX = "containerd.io/snapshot/"                  # annotations with it become labels
LABEL_UID_MAPPING = "containerd.io/snapshot/uidmapping"   # containerID:hostID:size[,...]
LABEL_GID_MAPPING = "containerd.io/snapshot/gidmapping"


class Kind(Enum):
    """The values are the words of containerd's filters."""

    VIEW = "view"
    ACTIVE = "active"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """`name`: flat, as containerd hands it; `parent`: "" for none; `created`, `updated`: Unix time in ns."""

    name: str
    parent: str
    kind: Kind
    labels: Mapping[str, str] = field(default_factory=dict)
    created: int = 0
    updated: int = 0


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount for containerd to make. `target`: below the root that it mounts on, nearly always ""."""

    type: str
    source: str
    options: tuple[str, ...]
    target: str = ""


@dataclass(frozen=True, slots=True)
class Usage:
    """Disk space in use: `size_bytes` of allocated blocks, `inodes`."""

    size_bytes: int
    inodes: int
