"""Many images that share their lower layers, as the images of a real node do."""

from __future__ import annotations

import io
import tarfile
from typing import IO, TYPE_CHECKING

from benchmarks.imagekit.build import TAG
from benchmarks.imagekit.layout import extend
from benchmarks.kit.lazy import convert
from benchmarks.session import NUMPY, remove

if TYPE_CHECKING:
    from benchmarks.session import Session

_OWN_BYTES = 100_000


def many_lazy_images(session: Session, count: int) -> list[str]:
    """References of `count` lazy images, each with one small layer of its own on top of the web image's."""
    references = []
    for number in range(count):
        layout = session.place.top / "many"

        def fill(sink: IO[bytes], number: int = number) -> int:
            with tarfile.open(fileobj=sink, mode="w|") as archive:
                member = tarfile.TarInfo(f"opt/app-{number}/data")
                member.size = _OWN_BYTES
                archive.addfile(member, io.BytesIO(str(number).encode() * _OWN_BYTES))
            return 1

        remove(layout)
        extend(session.layout(NUMPY), layout, f"app {number}", fill, TAG)
        reference = session.near.reference("many", f"lazy-{number}")
        convert(session.place, f"oci:{layout}:{TAG}", reference, "--quiet")
        references.append(reference)
    return references
