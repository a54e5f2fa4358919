"""
Labels of snapshots: how long they may be, and how Update's field mask changes them. As containerd does both.

Layer: snapshotter, above model. Who calls: core. No state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snapshotter.failures import SnapshotInvalidError
from snapshotter.model import LABEL_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SHOWN_CHARS = 64


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises SnapshotInvalidError: as containerd does."""
    for key, value in labels.items():
        total = len(key.encode()) + len(value.encode())
        if total > LABEL_BYTES_MAX:
            raise SnapshotInvalidError(f"label {key[:_SHOWN_CHARS]!r}: key and value have {total} bytes, "
                                       f"at most {LABEL_BYTES_MAX} may be")


def changed_labels(name: str, old: Mapping[str, str], labels: Mapping[str, str],
                   paths: Sequence[str]) -> dict[str, str]:
    """
    `old` with what `paths` name taken from `labels`: "labels.KEY" one, "labels" or no paths all.

    Raises:
        SnapshotInvalidError: another field; labels that cannot be. `name` of the snapshot is for that.

    """
    new = dict(old) if paths else dict(labels)
    for path in paths:
        field, _, key = path.partition(".")
        if path == "labels":
            new = dict(labels)
        elif field == "labels" and key:
            new[key] = labels.get(key, "")
        else:
            raise SnapshotInvalidError(f"field {path!r} of snapshot {name} cannot be changed, only labels can")
    check_labels(new)
    return new
