"""Recordings: as JSON and back, and everything that a hostile one may try."""

from __future__ import annotations

import json

import pytest

from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.profile import recording as module
from lazyfs.profile.recording import Recording, Touch, from_json, looks_like_recording, to_json
from tests.profilekit import digest, recording

GOOD = recording([(0, 0, 4096, 0.0), (1, 8192, 8200, 1.5), (0, 0, 1 << 20, 1.5)], devices=2, containers=("a", "b"))


def changed(**fields: object) -> bytes:
    return json.dumps({**json.loads(to_json(GOOD)), **fields}).encode()


def test_recordings_come_back() -> None:
    text = to_json(GOOD)
    assert from_json(text) == GOOD
    assert to_json(from_json(text)) == text
    assert text.count(b"\n") == 1
    assert json.loads(text)["touches"][1] == [1, 8192, 8200, 1500, 0]
    empty = Recording("", "", (), (), (), truncated=True)
    assert from_json(to_json(empty)) == empty


def test_times_are_kept_to_the_microsecond() -> None:
    one = Recording("", "", ((digest(0), 10),), ("c",), (Touch(0, 0, 1, 0.0014), Touch(0, 1, 2, 7.25)))
    assert [touch.ms for touch in from_json(to_json(one)).touches] == [0.001, 7.25]


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b"null", b'{"lazyfsRecording":1}', changed(image=1), changed(image="a\nb"),
        changed(tool="x" * 2000), changed(containers=["\x1b[0m"]), changed(unknown=1), changed(truncated=0),
        changed(devices=[["sha256:1", 5]]), changed(devices=[[digest(0), 1 << 44], [digest(1), 1]]),
        changed(devices=[[digest(0), -1]]), changed(devices=[[digest(0), 1]] * 600),
        changed(containers=["c"] * 5000), changed(containers=[]),
        changed(touches=[[2, 0, 1, 0, 0]]), changed(touches=[[0, 0, 1, 0, 2]]), changed(touches=[[-1, 0, 1, 0, 0]]),
        changed(touches=[[0, 5, 5, 0, 0]]), changed(touches=[[0, 6, 5, 0, 0]]),
        changed(touches=[[0, 0, (1 << 20) + 1, 0, 0]]), changed(touches=[[0, 0, 1, 5, 0], [0, 0, 1, 4, 0]]),
        changed(touches=[[0, 0, 1, 10**16, 0]]), changed(touches=[[0, 0, 1, -1, 0]]), changed(touches=[[0, 0, 1, 0]]),
        changed(touches=[[0, 0, 1, 0, 0, 0]]), changed(touches=[[0, 0, 1, 1.5, 0]]),
        changed(touches=[[0, 0, 1, 1e999, 0]]),
        changed(touches=[[0, 0, 10**30, 0, 0]]), b'{"lazyfsRecording":1,"image":"\xff"}',
        b'{"lazyfsRecording":1,"x":' + b"[" * 100_000,
    ],
)  # fmt: skip
def test_malformed_recordings_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        from_json(data)


def test_too_many_touches_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_COUNT_MAX", 10)
    with pytest.raises(FormatError, match="more than 10 touches"):
        from_json(changed(touches=[[0, 0, 1, 0, 0]] * 600))
    monkeypatch.setattr(module, "RECORDING_BYTES_MAX", 100)
    with pytest.raises(FormatError, match="at most 100"):
        from_json(to_json(GOOD))


def test_other_versions_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="version 2"):
        from_json(b'{"lazyfsRecording":2,"anything":[]}')


def test_what_looks_like_a_recording() -> None:
    assert looks_like_recording(to_json(GOOD))
    assert looks_like_recording(json.dumps(json.loads(to_json(GOOD)), indent=2).encode())
    assert not looks_like_recording(b"# lazyfs-prefetch 1\n")
    assert not looks_like_recording(b'{"lists":1}')
