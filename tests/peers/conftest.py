"""What the clusters of a module share: a workspace, the registry that images are pushed to, the images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.kit.workspace import workspace
from benchmarks.session import Session
from tests.peerskit import IMAGE, SIZE, require_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    require_cluster()
    with workspace() as place:
        made = Session(place, 1)
        from benchmarks.faultrows.images import random_image  # noqa: PLC0415

        random_image(made, IMAGE, SIZE, made.near)
        yield made
