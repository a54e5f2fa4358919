"""
Between containerd's messages and our own values: records, mounts, errors, the requests of a write.

Layer: snapshotter, above snapshotter.api and model. Who calls: snapshotter.containerd.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc

from lazyfs import limits
from lazyfs.errors import DeadlineError, DiskFullError, FormatError, HostError, LazyfsError, NotFoundError, SourceError
from lazyfs.image.descriptor import Descriptor
from lazyfs.image.digest import Digest
from snapshotter.api import content_pb2 as content
from snapshotter.api import snapshots_pb2
from snapshotter.api.descriptor_pb2 import Descriptor as ApiDescriptor
from snapshotter.model import Kind, Mount, SnapshotInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from snapshotter.api import images_pb2
    from snapshotter.api.mount_pb2 import Mount as ApiMount

ASK_FIRST_BYTES: Final = 128 * limits.KIB      # less is sent sooner than an answer comes
ANSWER_S: Final = 30.0
_HINT: Final = "is containerd running? Its socket is named with --containerd-address"
# gRPC for Go (the last: of containerd 1.6): a connection of containerd's own failed, or ended before it had begun, for
# who listened there was killed, or had not got so far
_UNSENT: Final = ("Error while dialing", "error reading server preface", "timed out waiting for server handshake",
                  "connection closed")    # the last is 1.6's word for a connection that ended before it was one
_MUTE: Final = "failed to connect to all addresses"          # our own gRPC's words
_NO_SNAPSHOTTER: Final = "is the snapshotter running? systemctl status lazyfs-snapshotter"
_SAID: Final = (                 # what containerd says (or its status), what it is for us, what to do
    ("snapshotter not loaded", HostError, "'ctr plugins ls' shows them; 'lazyfs snapshotter install' adds ours"),
    ("no space left", DiskFullError, "make room where containerd keeps its data"),
    *((words, HostError, _NO_SNAPSHOTTER) for words in _UNSENT),
    ("UNIMPLEMENTED", HostError, "is that containerd's socket, and is it 1.6 or newer?"),
)
_KINDS: Final = {snapshots_pb2.VIEW: Kind.VIEW, snapshots_pb2.ACTIVE: Kind.ACTIVE,
                 snapshots_pb2.COMMITTED: Kind.COMMITTED}


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """A name that containerd knows, and the manifest or index that it stands for. `updated`: Unix time in ns."""

    name: str
    target: Descriptor
    labels: Mapping[str, str]
    updated: int = 0


@dataclass(frozen=True, slots=True)
class ContentInfo:
    """One blob of the content store. `size` in bytes."""

    digest: Digest
    size: int
    labels: Mapping[str, str]


def translate(error: grpc.RpcError, address: str) -> LazyfsError:
    """What a failed call means to a user."""
    code, details = error.code(), str(error.details() or "").replace("\n", " ")[:1000]
    status = grpc.StatusCode
    text = f"containerd: {details}"
    if code is status.UNAVAILABLE and not _answers(address):
        return HostError(f"containerd does not answer at {address}", hint=_HINT)
    if code is status.UNAVAILABLE and _MUTE in details:
        return HostError(f"somebody listens at {address}, but does not answer", hint="look at containerd's log")
    if code is status.DEADLINE_EXCEEDED:
        return DeadlineError(f"containerd at {address} did not answer in time",
                             hint="look at containerd's log, and whether its snapshotter answers: lazyfs doctor")
    if code is status.NOT_FOUND:
        return NotFoundError(text)
    for words, kind, hint in _SAID:
        if words in details or words == code.name:
            return kind(text, hint=hint)
    transient = code in (status.UNAVAILABLE, status.ABORTED, status.RESOURCE_EXHAUSTED)
    return SourceError(text, transient=transient)


def was_unsent(error: grpc.RpcError) -> bool:
    """Whether containerd could not reach whom it asks, a snapshotter that is just restarted say: nothing was done."""
    details = str(error.details() or "")
    return error.code() is grpc.StatusCode.UNAVAILABLE and any(words in details for words in _UNSENT)


def _answers(address: str) -> bool:
    """Whether somebody listens there: else the trouble lies with what containerd itself asks, a snapshotter say."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(address)
        except OSError:
            return False
    return True


class Writing:
    """
    The requests of one content.Write, made while the answers come in. The last piece goes with the commit, so that a
    small blob takes one message. `failed`: what `pieces` raised; gRPC would hide it.
    """

    def __init__(self, ref: str, digest: Digest, size: int, pieces: Callable[[], Iterable[bytes]],
                 labels: Mapping[str, str]) -> None:
        self._ref, self._digest, self._size = ref, digest, size
        self._pieces = pieces
        self._labels = labels
        self._answered = threading.Event()
        self._ended = False
        self._written = 0
        self.failed: BaseException | None = None
        self.done = False

    def requests(self) -> Iterator[content.WriteContentRequest]:
        """For gRPC's thread. A large blob is only begun when containerd said that it does not have it."""
        offset = 0
        try:
            if self._size > ASK_FIRST_BYTES:
                yield content.WriteContentRequest(
                    action=content.STAT, ref=self._ref, total=self._size, expected=self._digest.text)
                if not self._answered.wait(ANSWER_S) or self._ended:
                    return
                if self._written == self._size:      # there, but not in this namespace yet
                    yield content.WriteContentRequest(
                        action=content.COMMIT, ref=self._ref, total=self._size, expected=self._digest.text,
                        offset=self._size, labels=self._labels)
                    return
            for piece in self._pieces():
                last = offset + len(piece) >= self._size
                yield content.WriteContentRequest(
                    action=content.COMMIT if last else content.WRITE, ref=self._ref, total=self._size,
                    expected=self._digest.text, offset=offset, data=piece, labels=self._labels if last else None)
                offset += len(piece)
        except GeneratorExit:            # the call has ended, and nobody asks for more
            raise
        except BaseException as error:
            self.failed = error
            raise

    def answer(self, answer: content.WriteContentResponse) -> None:
        self._written = answer.offset
        self._answered.set()
        self.done = answer.action == content.COMMIT

    def end(self) -> None:
        """No more answers will come."""
        self._ended = not self._answered.is_set()
        self._answered.set()


def image_record(image: images_pb2.Image) -> ImageRecord:
    """Raises FormatError: its digest is not SHA-256."""
    return ImageRecord(image.name, from_api(image.target), dict(image.labels), image.updated_at.ToNanoseconds())


def image_records(images: Iterable[images_pb2.Image]) -> list[ImageRecord]:
    """Those whose digest is of a kind that we know."""
    found = []
    for image in images:
        with contextlib.suppress(FormatError):
            found.append(image_record(image))
    return found


def from_api(found: ApiDescriptor) -> Descriptor:
    return Descriptor(found.media_type, Digest(found.digest), found.size, dict(found.annotations))


def to_api(descriptor: Descriptor) -> ApiDescriptor:
    return ApiDescriptor(media_type=descriptor.media_type, digest=descriptor.digest.text, size=descriptor.size,
                         annotations=dict(descriptor.annotations))


def snapshot_info(info: snapshots_pb2.Info) -> SnapshotInfo:
    return SnapshotInfo(info.name, info.parent, _KINDS.get(info.kind, Kind.ACTIVE), dict(info.labels),
                        info.created_at.ToNanoseconds(), info.updated_at.ToNanoseconds())


def api_mounts(found: Iterable[ApiMount]) -> list[Mount]:
    return [Mount(one.type, one.source, tuple(one.options), one.target) for one in found]
