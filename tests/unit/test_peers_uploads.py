"""Whose turn it is to send, and what is compressed: on a clock of trio's, without a network."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from lazyfs.errors import PeerBusyError
from lazyfs.peers.hop import Hop
from lazyfs.peers.model import BEAT_S, Priority
from lazyfs.peers.rates import BURST_S
from lazyfs.peers.uploads import ALONE_S, UploadLimits, Uploads
from lazyfs.peers.wire import Encoding

pytestmark = pytest.mark.trio
MIB = 1 << 20
TEXT = b"".join(b"%d bottles of beer\n" % number for number in range(60_000))[:MIB]
NOISE = random.Random(1).randbytes(MIB)


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


class Sender:
    """Sends pieces through `uploads`; `order` says who had its turn when."""

    def __init__(self, uploads: Uploads) -> None:
        self.uploads = uploads
        self.order: list[tuple[str, float]] = []
        self.beats = 0

    async def beat(self) -> None:
        self.beats += 1
        await trio.lowlevel.checkpoint()

    async def send(self, name: str, priority: Priority, size: int = MIB, wire: int | None = None) -> None:
        turn = await self.uploads.begin(priority, size, self.beat)
        self.order.append((name, trio.current_time()))
        self.uploads.end(turn, size, size if wire is None else wire)


async def test_foreground_passes_what_waits(autojump_clock: trio.testing.MockClock) -> None:
    sender = Sender(Uploads(UploadLimits(rate=MIB)))
    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(sender.send, f"copy {number}", Priority.COPY)
        await trio.sleep(1.2)
        nursery.start_soon(sender.send, "read", Priority.FOREGROUND)
    names = [name for name, _ in sender.order]
    assert names.index("read") == 2, "of the three copies two had begun"
    assert sender.order[-1][1] == pytest.approx(3 - BURST_S, abs=0.1), "four pieces at one a second, less the burst"
    assert sender.beats >= 3 / BEAT_S, "who waits says that it is alive"


async def test_what_compresses_costs_what_goes_over_the_wire(autojump_clock: trio.testing.MockClock) -> None:
    sender = Sender(Uploads(UploadLimits(rate=MIB)))
    for number in range(9):
        await sender.send(str(number), Priority.COPY, wire=MIB // 4)
    assert sender.order[-1][1] < 2.5, "nine quarters"
    assert sender.uploads.counters.plain_bytes == 9 * MIB
    assert sender.uploads.counters.wire_bytes == 9 * MIB // 4


async def test_places_are_kept_for_foreground_and_given_on(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(UploadLimits(concurrent=4))
    first, second, _ = [await uploads.begin(Priority.COPY, MIB, nothing) for _ in range(3)]
    began: list[Priority] = []

    async def begin(priority: Priority) -> None:
        await uploads.begin(priority, MIB, nothing)
        began.append(priority)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(begin, Priority.COPY)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(begin, Priority.FOREGROUND)
        await trio.testing.wait_all_tasks_blocked()
        assert began == [Priority.FOREGROUND]
        uploads.end(first, MIB, MIB)
        await trio.testing.wait_all_tasks_blocked()
        assert began == [Priority.FOREGROUND], "three are sending still"
        uploads.end(second, MIB, 0)
    assert began == [Priority.FOREGROUND, Priority.COPY]


async def test_pieces_that_reads_wait_for_go_one_after_another(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(UploadLimits())
    began: list[tuple[str, float]] = []

    async def send(name: str, priority: Priority, seconds: float) -> None:
        turn = await uploads.begin(priority, MIB, nothing)
        began.append((name, trio.current_time()))
        await trio.sleep(seconds)
        uploads.end(turn, MIB, MIB)

    async with trio.open_nursery() as nursery:
        for name, priority, seconds in (("quick", Priority.FOREGROUND, ALONE_S / 2), ("copy", Priority.COPY, 1.0),
                                        ("stuck", Priority.FOREGROUND, 60.0), ("next", Priority.FOREGROUND, 0.0)):
            nursery.start_soon(send, name, priority, seconds)
            await trio.testing.wait_all_tasks_blocked()
    names, times = zip(*began, strict=True)
    assert names == ("quick", "stuck", "next", "copy")
    assert times == pytest.approx([0, ALONE_S / 2, 1.5 * ALONE_S, 1.5 * ALONE_S]), "nobody waits long for who is stuck"


async def test_who_leaves_the_queue_holds_up_nobody(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(UploadLimits(concurrent=1))
    sender = Sender(uploads)
    turn = await uploads.begin(Priority.FOREGROUND, MIB, nothing)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(3.3):
            await sender.send("leaves", Priority.FOREGROUND)
        nursery.start_soon(sender.send, "stays", Priority.COPY)
        await trio.testing.wait_all_tasks_blocked()
        uploads.end(turn, MIB, MIB)
    assert [name for name, _ in sender.order] == ["stays"]
    assert uploads.sending == 0


async def test_what_cannot_be_done_in_time_is_not_begun(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(UploadLimits(rate=MIB))
    with uploads.request("a", Priority.FOREGROUND, 20 * MIB, 60.0):
        with pytest.raises(PeerBusyError, match="to be sent before") as caught, \
                uploads.request("b", Priority.FOREGROUND, MIB, 10.0):
            pass
        assert caught.value.retry_after_s == pytest.approx(10.0)
        with uploads.request("b", Priority.FOREGROUND, MIB, 30.0):
            assert uploads.open_requests == 2
    with uploads.request("b", Priority.FOREGROUND, 100 * MIB, 1.0):
        pass     # alone it may be as large as it likes: its asker's time is its own
    assert uploads.open_requests == 0
    assert (uploads.counters.requests, uploads.counters.refused_busy) == (3, 1)


async def test_other_bounds_count_at_once(autojump_clock: trio.testing.MockClock) -> None:
    uploads = Uploads(UploadLimits(rate=1))
    sender = Sender(uploads)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sender.send, "first", Priority.COPY, 1000)
        nursery.start_soon(sender.send, "second", Priority.COPY, 1000)
        await trio.testing.wait_all_tasks_blocked()
        assert len(sender.order) == 1
        uploads.change(UploadLimits())
        with trio.fail_after(2):
            while len(sender.order) < 2:  # noqa: ASYNC110 - what is looked at is whether it needs anybody's help
                await trio.sleep(0.1)


@pytest.mark.parametrize(("data", "rate", "encoding"), [
    (TEXT, 5e6, Encoding.LZ4), (TEXT, 20e9, Encoding.RAW), (TEXT, 0.0, Encoding.RAW), (NOISE, 5e6, Encoding.RAW),
], ids=["slow link", "fast link", "unknown link", "noise"])
async def test_what_is_compressed(data: bytes, rate: float, encoding: Encoding) -> None:
    hop = Hop(busy_share=1000.0)
    for _ in range(5):
        found, body, stored = await hop.encode("device/x", data, len(data), rate)
        assert found is encoding
        assert stored == len(body if isinstance(body, bytes) else data)
        assert (stored < len(data) / 2) == (encoding is Encoding.LZ4)


async def test_noise_is_tried_seldom_and_text_behind_it_is_found() -> None:
    hop = Hop(busy_share=1000.0)
    for _ in range(40):
        assert (await hop.encode("device/x", NOISE, MIB, 5e6))[0] is Encoding.RAW
    found = [(await hop.encode("device/x", TEXT, MIB, 5e6))[0] for _ in range(20)]
    assert found[0] is Encoding.RAW
    assert found[-1] is Encoding.LZ4


async def test_a_busy_process_does_not_compress(monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter(range(100))
    monkeypatch.setattr("lazyfs.peers.hop.time.process_time", lambda: float(next(used)))
    monkeypatch.setattr("lazyfs.peers.hop.time.monotonic", iter(range(100)).__next__)
    hop = Hop()
    found = [(await hop.encode("device/x", TEXT, MIB, 5e6))[0] for _ in range(4)]
    assert found == [Encoding.LZ4, *[Encoding.RAW] * 3], "nothing was known of the process at first"
