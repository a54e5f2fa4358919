"""
Client of containerd's API over its unix socket: what `lazyfs pull` and the snapshotter ask of it, in plain values.

Layer: snapshotter, above snapshotter.api and model. Who calls: snapshotter.pull, snapshotter.lazy*. Blocking, for any
number of threads. Invariants: every call has a deadline; no message above MESSAGE_BYTES_MAX is taken; gRPC's own
errors do not leave this module (`translate`). What may rightly be there already, or not, is an answer (a bool, a
None), no error.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from lazyfs import limits
from lazyfs.errors import FormatError, NotFoundError, SourceError
from lazyfs.image.digest import Digest
from snapshotter.api import content_pb2 as content
from snapshotter.api import diff_pb2, images_pb2, leases_pb2, namespaces_pb2, snapshots_pb2, version_pb2
from snapshotter.api.mount_pb2 import Mount as ApiMount
from snapshotter.containerdwords import (
    ContentInfo,
    ImageRecord,
    Writing,
    api_mounts,
    image_record,
    image_records,
    snapshot_info,
    to_api,
    translate,
    was_unsent,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from lazyfs.image.descriptor import Descriptor
    from snapshotter.model import Mount, SnapshotInfo

DEFAULT_ADDRESS = "/run/containerd/containerd.sock"
CALL_S: Final = 30.0             # one small call; containerd's own database may be busy collecting garbage
RESTART_S: Final = 8.0           # a snapshotter restarts in 1 s; containerd dials it again after 3.6 s at the latest
_RESTART_PAUSE_S: Final = 0.2
MESSAGE_BYTES_MAX: Final = 16 * limits.MIB     # containerd's own bound for what it takes
PIECE_BYTES: Final = limits.MIB  # of content in one message
WRITE_BYTES_PER_S: Final = 64 * limits.KIB     # slower than that, a write or an unpacking is given up
_WRITTEN_AS: Final = ("layer", "config", "unknown")     # what comes in pieces; remotes.MakeRefKey
_SERVICES: Final = "containerd.services."


class Containerd:
    """
    containerd at `address`, in one namespace, and with one lease if any. `in_namespace` and `with_lease` give others
    over the same connection; close the first one only.

    Nothing is connected before the first call. Any call raises HostError (containerd is not there), DeadlineError, or
    SourceError (it refuses, and why).
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, namespace: str = "default") -> None:
        self.address = address
        self.namespace = namespace
        self.lease = ""
        self._channel = grpc.insecure_channel(f"unix:{address}", options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
            ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
            ("grpc.default_authority", "localhost"),     # of a path, Go's servers refuse it
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ])

    def in_namespace(self, namespace: str) -> Self:
        return self._copy(namespace, "")

    def with_lease(self, lease: str) -> Self:
        """What is made through the result belongs to the lease: garbage collection leaves it alone."""
        return self._copy(self.namespace, lease)

    def _copy(self, namespace: str, lease: str) -> Self:
        other = object.__new__(type(self))
        other.address, other.namespace = self.address, namespace
        other.lease, other._channel = lease, self._channel
        return other

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- calls --------------------------------------------------------------------------------------------------------

    @property
    def _metadata(self) -> list[tuple[str, str]]:
        found = [("containerd-namespace", self.namespace)]
        return [*found, ("containerd-lease", self.lease)] if self.lease else found

    def _call(self, method: str, request: Any, answer: Callable[[bytes], Any], timeout_s: float = CALL_S) -> Any:
        """One unary call, made again while a snapshotter restarts; raises grpc.RpcError."""
        call = self._channel.unary_unary(f"/{_SERVICES}{method}", type(request).SerializeToString, answer)
        deadline = time.monotonic() + RESTART_S
        while True:
            try:
                return call(request, timeout=timeout_s, metadata=self._metadata)
            except grpc.RpcError as error:
                if not was_unsent(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_RESTART_PAUSE_S)

    def _ask(self, method: str, request: Any, answer: Callable[[bytes], Any], timeout_s: float = CALL_S) -> Any:
        """The same, with errors of ours."""
        try:
            return self._call(method, request, answer, timeout_s)
        except grpc.RpcError as error:
            raise translate(error, self.address) from None

    def _stream(self, method: str, request: Any, answer: Callable[[bytes], Any], timeout_s: float = CALL_S) -> Any:
        call = self._channel.unary_stream(f"/{_SERVICES}{method}", type(request).SerializeToString, answer)
        return call(request, timeout=timeout_s, metadata=self._metadata)

    def version(self, timeout_s: float = CALL_S) -> str:
        """Of containerd, for example "1.6.20"."""
        found = self._ask("version.v1.Version/Version", Empty(), version_pb2.VersionResponse.FromString, timeout_s)
        return str(found.version)

    def namespaces(self) -> list[str]:
        found = self._ask("namespaces.v1.Namespaces/List", namespaces_pb2.ListNamespacesRequest(),
                          namespaces_pb2.ListNamespacesResponse.FromString)
        return [namespace.name for namespace in found.namespaces]

    # --- images -------------------------------------------------------------------------------------------------------

    def images(self, filters: Sequence[str] = ()) -> list[ImageRecord]:
        found = self._ask("images.v1.Images/List", images_pb2.ListImagesRequest(filters=filters),
                          images_pb2.ListImagesResponse.FromString)
        return image_records(found.images)

    def image(self, name: str) -> ImageRecord | None:
        try:
            return image_record(self._ask("images.v1.Images/Get", images_pb2.GetImageRequest(name=name),
                                    images_pb2.GetImageResponse.FromString).image)
        except NotFoundError:
            return None

    def put_image(self, name: str, target: Descriptor) -> bool:
        """Create the image, or make it name another target. True: it is new. Labels of an old one stay."""
        image = images_pb2.Image(name=name, target=to_api(target))
        for _ in range(3):           # somebody may remove it between the two calls
            try:
                self._call("images.v1.Images/Create", images_pb2.CreateImageRequest(image=image),
                           images_pb2.CreateImageResponse.FromString)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ALREADY_EXISTS:
                    raise translate(error, self.address) from None
            else:
                return True
            try:
                self._ask("images.v1.Images/Update",
                          images_pb2.UpdateImageRequest(image=image, update_mask=FieldMask(paths=["target"])),
                          images_pb2.UpdateImageResponse.FromString)
            except NotFoundError:
                continue
            return False
        raise SourceError(f"image {name}: somebody else removes it again and again")

    # --- content ------------------------------------------------------------------------------------------------------

    def content_info(self, digest: Digest) -> ContentInfo | None:
        try:
            info = self._ask("content.v1.Content/Info", content.InfoRequest(digest=digest.text),
                             content.InfoResponse.FromString).info
        except NotFoundError:
            return None
        return ContentInfo(Digest(info.digest), info.size, dict(info.labels))

    def contents(self, filters: Sequence[str] = ()) -> list[ContentInfo]:
        """All blobs of this namespace."""
        request = content.ListContentRequest(filters=filters)
        try:
            pages = list(self._stream("content.v1.Content/List", request, content.ListContentResponse.FromString))
        except grpc.RpcError as error:
            raise translate(error, self.address) from None
        return [ContentInfo(Digest(info.digest), info.size, dict(info.labels)) for page in pages for info in page.info]

    def read_content(self, digest: Digest, size_max: int) -> bytes:
        """
        A whole small blob, its digest checked.

        Raises:
            NotFoundError: it is not there. FormatError: it is larger than `size_max`, or other bytes.

        """
        request = content.ReadContentRequest(digest=digest.text)
        data = bytearray()
        pieces = self._stream("content.v1.Content/Read", request, content.ReadContentResponse.FromString)
        try:
            for piece in pieces:
                data += piece.data
                if len(data) > size_max:
                    pieces.cancel()
                    raise FormatError(f"containerd: content {digest.short} is larger than {size_max} bytes")
        except grpc.RpcError as error:
            raise translate(error, self.address) from None
        if Digest.of(bytes(data)) != digest:
            raise FormatError(f"containerd: content {digest.short} is damaged", hint="remove the image, pull it again")
        return bytes(data)

    def write_content(self, ref: str, digest: Digest, size: int, pieces: Callable[[], Iterable[bytes]],
                      labels: Mapping[str, str]) -> bool:
        """
        Write a blob, checked by containerd against size and digest. False: it was there; its labels are as they were.

        Args:
            ref: names the write; another one under way with this name makes this one fail (SourceError, transient).
            digest: of the blob.
            size: of the blob, in bytes.
            pieces: gives all its bytes, in pieces of at most PIECE_BYTES; what that raises comes out of here.
            labels: set together with the blob.

        """
        writing = Writing(ref, digest, size, pieces, labels)
        call = self._channel.stream_stream(
            f"/{_SERVICES}content.v1.Content/Write", content.WriteContentRequest.SerializeToString,
            content.WriteContentResponse.FromString)
        answers = call(writing.requests(), timeout=CALL_S + size / WRITE_BYTES_PER_S, metadata=self._metadata)
        try:
            for answer in answers:
                writing.answer(answer)
        except grpc.RpcError as error:
            if writing.failed is not None:
                raise writing.failed from None
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return False
            raise translate(error, self.address) from None
        finally:
            writing.end()
            answers.cancel()
        if not writing.done:
            raise SourceError(f"containerd: content {digest.short} was not completed")
        return True

    def label_content(self, digest: Digest, labels: Mapping[str, str]) -> None:
        """Set labels of a blob; its others stay. Raises NotFoundError."""
        mask = FieldMask(paths=[f"labels.{key}" for key in labels])
        self._ask("content.v1.Content/Update",
                  content.UpdateRequest(info=content.Info(digest=digest.text, labels=labels), update_mask=mask),
                  content.UpdateResponse.FromString)

    def write_offset(self, ref: str) -> int | None:
        """How much of a write has come so far, in bytes; None: there is no such write."""
        try:
            found = self._ask("content.v1.Content/Status", content.StatusRequest(ref=ref),
                              content.StatusResponse.FromString)
        except NotFoundError:
            return None
        return int(found.status.offset)

    def drop_write(self, ref: str) -> bool:
        """Have it forget a write, with all that has come; who is writing it fails. False: there is no such write."""
        try:
            self._ask("content.v1.Content/Abort", content.AbortRequest(ref=ref), Empty.FromString)
        except NotFoundError:
            return False
        return True

    # --- leases -------------------------------------------------------------------------------------------------------

    def create_lease(self, lease: str, labels: Mapping[str, str]) -> None:
        self._ask("leases.v1.Leases/Create", leases_pb2.CreateRequest(id=lease, labels=labels),
                  leases_pb2.CreateResponse.FromString)

    def leases(self) -> list[str]:
        found = self._ask("leases.v1.Leases/List", leases_pb2.ListRequest(), leases_pb2.ListResponse.FromString)
        return [lease.id for lease in found.leases]

    def hold(self, kind: str, name: str) -> None:
        """Add something to this client's lease. `kind`: "content", "ingests" or "snapshots/<snapshotter>"."""
        resource = leases_pb2.Resource(id=name, type=kind)
        self._ask("leases.v1.Leases/AddResource", leases_pb2.AddResourceRequest(id=self.lease, resource=resource),
                  Empty.FromString)

    def delete_lease(self, lease: str) -> None:
        """Idempotent."""
        try:
            self._ask("leases.v1.Leases/Delete", leases_pb2.DeleteRequest(id=lease), Empty.FromString)
        except NotFoundError:
            return

    # --- snapshots ----------------------------------------------------------------------------------------------------

    def prepare(self, snapshotter: str, key: str, parent: str, labels: Mapping[str, str]) -> list[Mount] | None:
        """Mounts of a new active snapshot; None: it (or what its snapshot.ref names) is there already."""
        request = snapshots_pb2.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
        try:
            found = self._call("snapshots.v1.Snapshots/Prepare", request,
                               snapshots_pb2.PrepareSnapshotResponse.FromString, CALL_S * 2)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return None
            raise translate(error, self.address) from None
        return api_mounts(found.mounts)

    def snapshot(self, snapshotter: str, key: str, timeout_s: float = CALL_S) -> SnapshotInfo | None:
        try:
            info = self._ask("snapshots.v1.Snapshots/Stat",
                             snapshots_pb2.StatSnapshotRequest(snapshotter=snapshotter, key=key),
                             snapshots_pb2.StatSnapshotResponse.FromString, timeout_s).info
        except NotFoundError:
            return None
        return snapshot_info(info)

    def snapshots(self, snapshotter: str, filters: Sequence[str] = ()) -> list[SnapshotInfo]:
        request = snapshots_pb2.ListSnapshotsRequest(snapshotter=snapshotter, filters=filters)
        answer = snapshots_pb2.ListSnapshotsResponse.FromString
        try:
            return [snapshot_info(info) for page in self._stream("snapshots.v1.Snapshots/List", request, answer)
                    for info in page.info]
        except grpc.RpcError as error:
            raise translate(error, self.address) from None

    def mounts(self, snapshotter: str, key: str) -> list[Mount]:
        return api_mounts(self._ask("snapshots.v1.Snapshots/Mounts",
                                 snapshots_pb2.MountsRequest(snapshotter=snapshotter, key=key),
                                 snapshots_pb2.MountsResponse.FromString).mounts)

    def commit(self, snapshotter: str, name: str, key: str, labels: Mapping[str, str]) -> bool:
        """False: `name` is there already."""
        request = snapshots_pb2.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key, labels=labels)
        try:
            self._call("snapshots.v1.Snapshots/Commit", request, Empty.FromString, CALL_S * 2)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                return False
            raise translate(error, self.address) from None
        return True

    def remove_snapshot(self, snapshotter: str, key: str) -> None:
        """Idempotent."""
        request = snapshots_pb2.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        try:
            self._ask("snapshots.v1.Snapshots/Remove", request, Empty.FromString)
        except NotFoundError:
            return

    # --- unpacking ----------------------------------------------------------------------------------------------------

    def apply(self, layer: Descriptor, mounts: Sequence[Mount]) -> Digest:
        """Unpack a layer of the content store into mounts; the digest of the uncompressed bytes."""
        made = [ApiMount(type=one.type, source=one.source, target=one.target, options=one.options) for one in mounts]
        found = self._ask("diff.v1.Diff/Apply", diff_pb2.ApplyRequest(diff=to_api(layer), mounts=made),
                          diff_pb2.ApplyResponse.FromString, CALL_S * 2 + layer.size / WRITE_BYTES_PER_S)
        return Digest(found.applied.digest)


def drop_writes(containerd: Containerd, digest: Digest) -> int:
    """
    Have it forget what any client has begun to write of a blob, in all namespaces. Returns how many there were.

    Raises as Containerd does. The names are those that containerd's own clients give: by what a manifest calls it.

    """
    spaces = [containerd.in_namespace(name) for name in containerd.namespaces()]
    return sum(space.drop_write(f"{kind}-{digest}") for space in spaces for kind in _WRITTEN_AS)
