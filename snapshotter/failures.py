"""
How an operation on snapshots may be refused: one kind for each answer that containerd tells apart.

The root, SnapshotError, is in lazyfs.errors. Layer: snapshotter, above nothing. Raised by records, core, filters,
overlay; service turns each into its gRPC status.
"""

from __future__ import annotations

from lazyfs.errors import SnapshotError


class SnapshotMissingError(SnapshotError):
    """No snapshot has that name, or the parent is gone."""


class SnapshotExistsError(SnapshotError):
    """The name is taken; or the layer is there already and needs no download (how a remote snapshotter says so)."""


class SnapshotStateError(SnapshotError):
    """Not in this state: not active, has children ..."""


class SnapshotInvalidError(SnapshotError):
    """The request itself is off: labels too long, no name, a filter that does not parse."""


class SnapshotUnavailableError(SnapshotError):
    """A lazy image below cannot be mounted now; trying again later may help."""
