"""What a node says that it has: what is in use, what is only cached, what can go."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from lazyfs import config
from lazyfs.fetch.transfer import Priority
from lazyfs.node.peering import NodePeers, _complete_devices
from lazyfs.peers.announce import COMPLETE, Standing
from tests.fetchbench import SAMPLE, bench
from tests.fetchkit import CHUNK

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.trio
PEERS = config.Peers(cluster="c", static=("127.0.0.1:9",))


async def test_what_is_in_use_is_said_with_its_share_and_whose_bytes_it_cost(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        peers = NodePeers(PEERS, b.cache, b.fetcher)
        assert peers.standings() == {}
        b.fetcher.peering.use([b.device])
        await b.read(0, 3 * CHUNK)
        await b.settled()
        count = SAMPLE.table.chunk_count    # of which one is zeros
        key = b.device.resource.key
        assert peers.standings() == {key: Standing(4 * COMPLETE // count, origin=3 * COMPLETE // count)}
        await b.read(0, len(SAMPLE.data))
        await b.settled()
        assert peers.standings()[key].done == COMPLETE
        b.fetcher.peering.leave([b.device])
        assert peers.standings() == {}


async def test_what_is_only_cached_is_said_until_it_can_go_and_again_when_it_is_used(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        await b.read(0, len(SAMPLE.data))
        await b.settled()
        peers = NodePeers(PEERS, b.cache, b.fetcher)
        peers.cached = _complete_devices(b.cache)
        key = b.device.resource.key
        assert peers.standings() == {key: Standing(COMPLETE, need=False)}
        peers.release(key, "some")
        assert peers.standings() == {}
        b.fetcher.peering.use([b.device])
        peers.release(key, "all")    # it is needed here
        assert peers.standings()[key].need
        b.fetcher.peering.leave([b.device])


async def test_a_peers_wish_is_fetched_like_a_read_and_counted(tmp_path: Path) -> None:
    async with bench(tmp_path) as b:
        for index, priority in enumerate((Priority.FOREGROUND, Priority.COPY)):
            data = await b.fetcher.peering.pass_on(b.device, index, deadline=time.monotonic() + 20, hops=1,
                                                   priority=priority)
            assert data is None
            assert b.device.cached.present(index, index)
        await b.settled()
        assert b.fetcher.statistics.passed_on == 2
