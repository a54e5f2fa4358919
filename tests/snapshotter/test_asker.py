"""The process that asks the registry for a pull: its answers, its errors, its end."""

from __future__ import annotations

import os
import pickle
import signal
from typing import TYPE_CHECKING

import pytest

from lazyfs import errors
from lazyfs.registry import RegistryOptions
from lazyfs.registry.fields import to_fields
from snapshotter import asker
from tests.lazykit import push_lazy
from tests.registrykit import running_registry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIELDS = to_fields(RegistryOptions(insecure=True))


@pytest.fixture
def asking() -> Iterator[asker.Asker]:
    asker.begin()
    found = asker.take()
    assert found is not None
    assert asker.take() is None
    yield found
    found.close()
    found.close()


def test_an_image_and_its_bootstrap(tmp_path: Path, asking: asker.Asker) -> None:
    with running_registry(tmp_path) as registry:
        name = push_lazy(tmp_path, registry.host, "app", {"f": b"data"})
        asking.ask(f"docker://{name}", None, name, "lazyfs", FIELDS)
        image = asking.image()
        assert image.bootstrap is not None
        assert image.bootstrap == image.layers[-1]
        assert image.bootstrap.annotations["containerd.io/snapshot/cri.image-ref"] == name
        assert len(asking.bootstrap()) == image.bootstrap.size


def test_what_it_raises_is_raised_here(tmp_path: Path, asking: asker.Asker) -> None:
    with running_registry(tmp_path) as registry:
        asking.ask(f"docker://{registry.host}/none:1", None, "none", "lazyfs", FIELDS)
        with pytest.raises(errors.NotFoundError):
            asking.image()


def test_its_death_is_an_error(asking: asker.Asker) -> None:
    os.kill(asking._process, signal.SIGKILL)
    asking.ask("docker://localhost:1/none:1", None, "none", "lazyfs", FIELDS)
    with pytest.raises(errors.SourceError, match="has died"):
        asking.image()


def test_errors_keep_all_they_say_on_the_way() -> None:
    for error in (errors.AuthError("a", hint="b"), errors.RateLimitedError("c", hint="d", retry_after_s=2.5),
                  errors.SourceError("e", hint="f", transient=False), errors.FormatError("g", hint="h")):
        found = pickle.loads(pickle.dumps(error))
        assert type(found) is type(error)
        assert (str(found), vars(found)) == (str(error), vars(error))
