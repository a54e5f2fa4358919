"""Shapes are decoded by several threads at once, the first of them too (lazyfs.shapes)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from lazyfs import shapes

ROOT = Path(__file__).resolve().parents[2]
# Types made anew, so that each round is a first use; with msgspec.json.decode it ends by signal 11 within a second.
ROUNDS = """
import sys, threading
import msgspec
from lazyfs import shapes
sys.setswitchinterval(1e-6)
for _ in range(300):
    class Inner(msgspec.Struct, kw_only=True, rename="camel"):
        media_type: str | None = None
        annotations: dict[str, str] | None = None
    class Outer(msgspec.Struct, kw_only=True):
        layers: list[Inner] = []
        config: Inner | None = None
        other: dict[str, Inner] | None = None
    barrier = threading.Barrier(4)
    found = []
    def decode(number):
        barrier.wait()
        shape = Outer if number % 2 else Inner
        found.append(shapes.from_json(b'{"layers": [{"mediaType": "x"}]}', shape))
    threads = [threading.Thread(target=decode, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
"""


class Shape(msgspec.Struct):
    number: int


def test_a_first_use_by_several_threads_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", ROUNDS], cwd=ROOT, capture_output=True, text=True, check=False,
                          timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_has_the_shape() -> None:
    assert shapes.from_json(b'{"number": 1}', Shape) == Shape(1)
    assert shapes.from_msgpack(msgspec.msgpack.encode({"number": 2}), Shape) == Shape(2)
    assert shapes.from_plain({"number": 3}, Shape) == Shape(3)
    assert shapes.from_json(b"[1, 2]", list[int]) == [1, 2]


@pytest.mark.parametrize("data", [b"", b"{", b'{"number": "x"}', b"[]"])
def test_what_has_not(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        shapes.from_json(data, Shape)


def test_nobody_goes_past_it() -> None:
    past = re.compile(r"msgspec\.(convert\(|(json|msgpack)\.(Decoder\(|decode\([^\n]*type=))")
    found = [str(path.relative_to(ROOT)) for folder in ("lazyfs", "converter", "snapshotter")
             for path in (ROOT / folder).rglob("*.py") if past.search(path.read_text())]
    assert found == ["lazyfs/shapes.py"]
