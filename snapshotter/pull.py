"""
`lazyfs pull`: an image from a registry into containerd, unpacked; of a lazy image, its documents and bootstrap only.

Layer: snapshotter, above containerd, pullimage, unpack. Who calls: lazyfs.cli.pull. Invariants: everything made on the
way belongs to a lease that ends by itself, so a pull may be killed at any point; the image's record is made last, when
all of it is there. Cheap to import: what a pull needs comes in while it waits for others.

Threads: one imports gRPC and takes the lease while the registry is asked (by a process that has begun early, asker.py,
if this is the command line); then one a blob; this one unpacks.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from lazyfs.errors import DeadlineError, IntegrityError, LazyfsError, SourceError, UsageError
from lazyfs.registry import RegistryReference, open_source, parse_reference
from snapshotter import asker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.image.descriptor import Descriptor
    from lazyfs.image.digest import Digest
    from lazyfs.registry import RegistryOptions
    from lazyfs.registry.place import ImageSource
    from snapshotter.containerd import Containerd
    from snapshotter.pullimage import Blob, PullImage

LEASE_HOURS: Final = 24          # as containerd's own clients
JOBS: Final = 6                  # blobs at a time
BUSY_S: Final = 600.0            # somebody else writes the same blob: wait as long as that
PIECE_BYTES: Final = 1 << 20


class Progress(Protocol):
    """Who is told how far it is; from any thread. lazyfs.cli.output has some."""

    def start(self, task: str, label: str, total_bytes: int) -> None: ...

    def advance(self, task: str, size_bytes: int) -> None: ...

    def finish(self, task: str, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class PullOrder:
    """What to pull, and where to. `reference` as the user wrote it; `platform` None: this machine's."""

    reference: str
    registry: RegistryOptions
    address: str
    namespace: str = "default"
    snapshotter: str = "lazyfs"
    platform: str | None = None


@dataclass
class PullReport:
    """What was done. `fetched_bytes`: from the registry; `seconds`: by phase, in order."""

    name: str
    digest: str = ""
    chain_id: str = ""
    is_lazy: bool = False
    layer_count: int = 0
    unpacked_count: int = 0
    fetched_bytes: int = 0
    image_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


def pull(order: PullOrder, progress: Progress) -> PullReport:
    """
    Pull an image.

    Raises:
        UsageError: not a reference to a registry. HostError: containerd or the snapshotter is not there.
        LazyfsError: whatever else went wrong; nothing of the image is visible then that was not before.

    """
    reference = parse_reference(order.reference)
    if not isinstance(reference, RegistryReference):
        raise UsageError(f"{order.reference[:200]}: containerd pulls from registries only",
                         hint="push it to a registry first: skopeo copy")
    name = reference.text.removeprefix("docker://")
    report = PullReport(name)
    clock = _Clock(report.seconds)
    with contextlib.closing(_Registry(order, reference.text, name)) as registry, _Connecting(order) as connecting:
        image = registry.resolve()
        report.digest, report.chain_id = image.target.digest.text, image.chain_ids[-1]
        report.is_lazy, report.layer_count = image.bootstrap is not None, len(image.layers)
        report.image_bytes = sum(layer.size for layer in image.layers)
        clock.end("resolve")
        client = connecting.wait()
        clock.end("connect")
        _Pull(order, image, client, registry, progress, report, reference).run(clock)
    clock.end("release")
    return report


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.monotonic()

    def end(self, phase: str) -> None:
        now = time.monotonic()
        self._seconds[phase], self._last = round(now - self._last, 4), now


class _Registry:
    """The registry's side of a pull: asked by the process that has begun early, if there is one; else from here."""

    def __init__(self, order: PullOrder, reference: str, name: str) -> None:
        self._order, self._reference, self._name = order, reference, name
        self._asker = asker.take()
        self._source: ImageSource | None = None
        self._early: Descriptor | None = None        # a blob that the asker will send
        self._mutex = threading.Lock()
        if self._asker is not None:
            from lazyfs.registry.fields import to_fields  # noqa: PLC0415

            self._asker.ask(reference, order.platform, name, order.snapshotter, to_fields(order.registry))

    def resolve(self) -> PullImage:
        """What is to be pulled. Raises LazyfsError."""
        if self._asker is None:
            from snapshotter.pullimage import resolve  # noqa: PLC0415

            return resolve(self._open(), self._order.platform, self._name, self._order.snapshotter)
        image = self._asker.image()
        bootstrap = image.bootstrap
        if bootstrap is not None and bootstrap.size <= asker.BOOTSTRAP_BYTES_MAX:
            self._early = bootstrap
        return image

    def blob(self, digest: Digest, size: int) -> Iterator[bytes]:
        """A blob, in pieces."""
        with self._mutex:
            early = self._early is not None and self._early.digest == digest
            self._early = None if early else self._early
        if early:
            assert self._asker is not None
            data = self._asker.bootstrap()
            yield from (data[start : start + PIECE_BYTES] for start in range(0, size, PIECE_BYTES))
            return
        with self._open().open_blob(digest, size) as stream:
            while piece := stream.read(PIECE_BYTES):
                yield piece

    def _open(self) -> ImageSource:
        with self._mutex:
            if self._source is None:
                self._source = open_source(self._reference, self._order.registry)
            return self._source

    def stop(self) -> None:
        """Wait for nothing of the asker's any more."""
        if self._asker is not None:
            self._asker.close()

    def close(self) -> None:
        self.stop()
        if self._source is not None:
            self._source.close()


class _Connecting:
    """Imports gRPC, connects, takes the lease; in a thread, while the registry is asked. At its end, gives it back."""

    def __init__(self, order: PullOrder) -> None:
        self._order = order
        self._lease = f"lazyfs-pull-{uuid.uuid4().hex}"
        self._client: Containerd | None = None
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="connect", daemon=True)

    def _run(self) -> None:
        try:
            from snapshotter.containerd import Containerd  # noqa: PLC0415 - 0.1 s

            self._client = Containerd(self._order.address, self._order.namespace)
            expires = datetime.now(UTC) + timedelta(hours=LEASE_HOURS)
            self._client.create_lease(self._lease, {"containerd.io/gc.expire": expires.strftime("%Y-%m-%dT%H:%M:%SZ")})
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._failed = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def wait(self) -> Containerd:
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        assert self._client is not None
        return self._client.with_lease(self._lease)

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        if self._client is not None:
            with contextlib.suppress(LazyfsError):       # it ends by itself
                if self._failed is None:
                    self._client.delete_lease(self._lease)
            self._client.close()


@dataclass
class _Pull:
    """One image on its way."""

    order: PullOrder
    image: PullImage
    client: Containerd
    registry: _Registry
    progress: Progress
    report: PullReport
    reference: RegistryReference
    stopped: bool = False

    def run(self, clock: _Clock) -> None:
        from snapshotter.unpack import Unpacker, held_layers  # noqa: PLC0415

        image, order = self.image, self.order
        pool = ThreadPoolExecutor(JOBS, thread_name_prefix="blob")
        try:
            documents = [pool.submit(self._put_document, blob) for blob in image.documents]
            first = held_layers(self.client, order.snapshotter, image)
            layers = self._start_layers(pool, first)
            labelled: list[Future[None]] = []

            def applied(place: int) -> None:
                self.report.unpacked_count += 1
                labelled.append(pool.submit(self._label_unpacked, place))

            Unpacker(self.client, order.snapshotter, image, lambda place: layers[place].result()).unpack(first, applied)
            clock.end("unpack")
            for future in [*documents, *labelled, *layers.values()]:
                future.result()
            clock.end("content")
            self.client.put_image(self.report.name, image.target)
            clock.end("record")
        finally:
            self.stopped = True
            self.registry.stop()
            pool.shutdown(cancel_futures=True)

    def _start_layers(self, pool: ThreadPoolExecutor, first: int) -> dict[int, Future[None]]:
        """The layers that must be had whole. The same blob twice in one image is fetched once."""
        from snapshotter.pullimage import is_lazy_blob  # noqa: PLC0415

        started: dict[Any, Future[None]] = {}
        found = {}
        for place in range(first, len(self.image.layers)):
            layer = self.image.layers[place]
            if not is_lazy_blob(layer):
                if layer.digest not in started:
                    started[layer.digest] = pool.submit(self._put_layer, place)
                found[place] = started[layer.digest]
        return found

    def _put_document(self, blob: Blob) -> None:
        data = blob.data
        assert data is not None
        self.report.fetched_bytes += len(data)
        self._put(_ref(blob.descriptor.media_type), blob, lambda: iter([data]))

    def _put_layer(self, place: int) -> None:
        from snapshotter.pullimage import Blob  # noqa: PLC0415

        layer = self.image.layers[place]
        task = layer.digest.text
        self.progress.start(task, layer.digest.short, layer.size)
        self._put("layer", Blob(layer, {}), lambda: self._pieces(place))
        self.progress.finish(task, f"layer {place + 1}: {layer.size / 1e6:.1f} MB")

    def _pieces(self, place: int) -> Iterator[bytes]:
        layer = self.image.layers[place]
        for piece in self.registry.blob(layer.digest, layer.size):
            if self.stopped:
                raise SourceError("the pull has ended")
            self.report.fetched_bytes += len(piece)
            self.progress.advance(layer.digest.text, len(piece))
            yield piece

    def _put(self, kind: str, blob: Blob, pieces: Any) -> None:
        """Content and its labels into containerd; those of content that is there are added to."""
        digest, ref = blob.descriptor.digest, f"{kind}-{blob.descriptor.digest}"
        key, repository = f"containerd.io/distribution.source.{_host(self.reference)}", self.reference.repository
        labels = {**blob.labels, key: repository}
        deadline = time.monotonic() + BUSY_S
        pause = 0.02
        while True:
            try:
                new = self.client.write_content(ref, digest, blob.descriptor.size, pieces, labels)
                break
            except SourceError as error:
                if "locked" not in str(error) or self.stopped:
                    raise _of_layer(error, blob) from None
                if time.monotonic() > deadline:
                    raise DeadlineError(f"another pull writes {digest.short}, and does not end",
                                        hint="look for it: ctr content active") from None
            time.sleep(pause)
            pause = min(pause * 2, 1.0)
        if not new:
            self.client.label_content(digest, self._merged(blob, key, repository))

    def _merged(self, blob: Blob, key: str, repository: str) -> dict[str, str]:
        """Labels for content that is there: the repositories that it came from are a sorted list."""
        info = self.client.content_info(blob.descriptor.digest)
        before = "" if info is None else info.labels.get(key, "")
        both = ",".join(sorted({*filter(None, before.split(",")), repository}))
        return {**blob.labels, **({key: both} if len(key) + len(both) <= 4096 else {})}

    def _label_unpacked(self, place: int) -> None:
        layer = self.image.layers[place]
        self.client.label_content(layer.digest, {"containerd.io/uncompressed": self.image.diff_ids[place].text})


def _of_layer(error: SourceError, blob: Blob) -> LazyfsError:
    """Size and digest are compared by containerd: its refusal means that the registry sent other bytes."""
    text = str(error)
    if "unexpected commit digest" in text or "unexpected commit size" in text:
        return IntegrityError(f"{blob.descriptor.digest.short}: the registry sent other bytes",
                              hint="the stored bytes are damaged, or were changed on the way")
    return error


def _ref(media_type: str) -> str:
    """First word of the name of a write, as containerd's clients choose it: they wait for each other by it."""
    if ".index." in media_type or "manifest.list" in media_type:
        return "index"
    return "manifest" if "manifest" in media_type else "config"


def _host(reference: RegistryReference) -> str:
    """Without the port, as containerd labels it."""
    host = reference.host
    return host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
