"""Fixtures for all tests: nobody leaves anything behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from lazyfs.node.rundir import run_root
from tests import leaks

if TYPE_CHECKING:
    from collections.abc import Iterator

_MARK = leaks.mark_environment()
_WORK_DIRS = ("/tmp/tutorial",)    # where the documents' commands work


@pytest.fixture(autouse=True)
def _nothing_left_behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves a mount, a process, a loop device or an open descriptor behind."""
    tops = (str(tmp_path_factory.getbasetemp()), str(run_root()), *_WORK_DIRS)
    scope = leaks.Scope(_MARK, tops)
    before = scope.take()
    yield
    left = leaks.wait_for_leaks(before, scope)
    if left:
        leaks.clear(left)
        pytest.fail(f"{request.node.name} left behind:\n  " + "\n  ".join(left), pytrace=False)
