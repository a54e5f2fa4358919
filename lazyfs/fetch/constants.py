"""Bounds and policy constants of the fetch engine, with their origin. Sizes of the format are in lazyfs.limits."""

from __future__ import annotations

from dataclasses import dataclass

from lazyfs import limits
from lazyfs.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """
    How much the engine does at once.

    Memory: a transfer holds at most one stored and one decoded chunk, whatever its size, so the threads together
    hold `2 * thread_count * CHUNK_SIZE_MAX_BYTES` at most: asserted below to fit into `IN_FLIGHT_BYTES_MAX`.
    """

    foreground_per_source: int = 8     # of one image
    foreground_per_server: int = 12    # of all images of a registry: a dead one must not take all slots from the others
    foreground_total: int = 16
    foreground_reserve: int = 4        # of these, the last: for images that have none under way
    foreground_bulk: int = 3           # of one that reads and reads, while others read too: the link's queue is short
    prefetch_streams: int = 4          # windows under way: of one image as few as keep the link full, the rest others'
    prefetch_rate: int = 0             # bytes/s of all windows together; 0: no bound
    prefetch_bytes_max: int = 0        # stored bytes fetched ahead of one image; 0: no bound
    background_streams: int = 2        # read-ahead of sequential readers; in a swarm one after another (courtesy)
    copy_streams: int = 2              # windows of background copies: one to receive, one that is about to answer
    merge_bytes_max: int = 4 * MIB     # one range request of queued chunks that are neighbours, stored bytes
    # One range request of the hot blob. The first one is small, for nothing is known of the link; each is twice as
    # large as the one before: few requests.
    window_bytes_first: int = 4 * MIB
    window_bytes_max: int = 32 * MIB   # a quarter of a second at 1 Gbit/s; several images at once take smaller turns
    readahead: bool = True

    @property
    def thread_count(self) -> int:
        return self.foreground_total + self.prefetch_streams + self.background_streams + self.copy_streams


IN_FLIGHT_BYTES_MAX = 64 * MIB   # the worker's budget: transfers, spilled chunks and held ones, whoever reads
SPILL_BYTES_MAX = 8 * MIB        # chunks that could not be stored, kept for the neighbouring reads of 128 KiB
# A transfer ends early after so much that was not stored, and for a while no other has more than one chunk: else each
# would hold all of its run.
UNSTORED_BYTES_MAX = limits.CHUNK_SIZE_MAX_BYTES
UNSTORED_S = 2.0
HELD_BYTES_MAX = 8 * MIB         # the same, held by reads of several chunks until all are there (fetch.budget)
# A source that asks for a longer pause is asked again all the same: reads that wait meanwhile get their try.
RETRY_AFTER_MAX_S = limits.READ_DEADLINE_S / 2
ERROR_MEMORY_S = 2.0             # the kernel repeats a failed read at once, page by page (reference: faults.md §2)
ABANDON_S = 3.0                  # a transfer for reads of which none waits any more goes on so long, for the cache
ERROR_MEMORY_COUNT_MAX = 1024
BAD_CHUNK_TRY_COUNT = 2          # a digest that does not match: once more from the source, then an error
# An attempt gets half of the time that is left, so that a connection gone dead leaves time for another one ...
ATTEMPT_SHARE = 0.5
ATTEMPT_WHOLE_S = 4.0            # ... but is not cut into slices too thin to be of use.
# The next window is asked for when less than this of the current one is to come: what its answer's delay takes at the
# rate so far (twice, for the rate still grows), and at least so much.
PREFETCH_OVERLAP_BYTES = 512 * KIB
OVERLAP_PARTS = 8                # but of a small one no more than this part
PREFETCH_OVERLAP_FACTOR = 2.0
PREFETCH_RATE_MIN = 64 * KIB     # bytes/s: a window slower than that is cut off, and the rest asked for anew
RATE_BYTES_MIN = 256 * KIB       # must have come before a rate is believed: the first bytes come with the header
# A read whose chunk is on its way in a window asks for it by itself if that is so much sooner: the bytes come twice.
OVERTAKE_FACTOR = 2.0
OVERTAKE_MARGIN_S = 0.05
# An image that has had more than BULK_BYTES of late makes way for the first reads of others; half of what it had is
# forgotten each SHARE_HALF_LIFE_S. 8 MiB: what a small program's start reads, whole.
BULK_BYTES = 8 * MIB
SHARE_HALF_LIFE_S = 1.0
BULK_ACTIVE_S = 3.0              # so long after its last fetch an image counts as one that reads as well
COURTESY_S = 0.5                 # windows stand back so long from when reads began; then they take their share again
PACE_SLICE_S = 0.1               # how soon a waiting window notices that it is waited for, or given up
# A window of a background copy. Two at most are under way: what a killed worker fetches again is below 8 MiB; and a
# read that comes in between waits for 34 ms of it at 1 Gbit/s, if the whole of it is in the link's buffers already.
COPY_WINDOW_BYTES = 4 * MIB
PEER_WINDOW_BYTES = 32 * MIB     # of one that comes from peers, chunk by chunk: a killed worker loses what is under way
COPY_WINDOW_BYTES_MIN = 256 * KIB    # of a slow one: a request costs the registry something too
PREFETCH_SCAN_COUNT_MAX = 2048   # plan entries looked at before the loop gets a turn
PREFETCH_FAILURE_COUNT_MAX = 6   # consecutive; then chunks come when they are read
READAHEAD_STREAM_COUNT_MAX = 16  # sequential readers told apart, a device
# What makes a sequential reader, read in a row, uncompressed. With 3 chunks, starts of tensorflow and numpy moved 1.11
# and 1.12 times what they touched; with 8 MiB 1.04 and 1.02, without read-ahead 1.01 and 1.02 (512 KiB chunks).
READAHEAD_SEQUENCE_BYTES_MIN = 8 * MIB
READAHEAD_BYTES_MAX = 4 * MIB    # uncompressed; never more than has been read in a row so far
# Of what peers give: a chunk passes a tree's levels one after another, so more must be under way. 8 real nodes, 50
# Mbit/s: 16 MiB 1.55 to 1.72 times the ideal time, 24 MiB 1.49 to 1.58; simulated, beyond that more comes twice. And
# it begins so much sooner: chunk by chunk the first 8 MiB of 8 real nodes took 2.6 s, now 1.7.
READAHEAD_PEERED_TIMES = 6
READ_ROUND_COUNT_MAX = 4         # a chunk that vanishes from the cache between its arrival and its read, so often
VERIFY_DEADLINE_SHARE = 0.25     # of a read's time, for the disk to give a chunk that the read takes a sample of
CLOSE_GRACE_S = 1.0              # transfers may finish before their threads are left behind (they are daemons)

assert FetchLimits().thread_count * 2 * limits.CHUNK_SIZE_MAX_BYTES <= (
    IN_FLIGHT_BYTES_MAX - SPILL_BYTES_MAX - HELD_BYTES_MAX)
assert FetchLimits().copy_streams * COPY_WINDOW_BYTES <= 8 * MIB    # the promise above
assert FetchLimits().merge_bytes_max <= FetchLimits().window_bytes_max <= limits.RANGE_REQUEST_BYTES_MAX
