"""
docker-archive: as a source: what `docker save` and `podman save` write.

Layer: registry. Who calls: opening.py. Docker image spec v1.2 "Combined Image JSON + Filesystem Changeset Format":
manifest.json lists, for each image, its config, names and layers. Both shapes are read: the old one (ID/layer.tar, with
symlinks between equal layers) and that of Docker 25 and later (blobs/sha256/...), which has a manifest.json too.
The image looks like one of a registry: a schema 2 manifest is made up from what is there. A layer's digest is its
diff_id when it is plain tar (the caller checks it against the bytes, as every digest), else computed, once.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import msgspec

from lazyfs import shapes
from lazyfs.errors import FormatError, LazyfsError, NotFoundError, UsageError
from lazyfs.image.digest import Digest
from lazyfs.limits import CONFIG_BYTES_MAX, DEVICE_COUNT_MAX, MANIFEST_BYTES_MAX, MIB, SYMLINK_HOPS_MAX
from lazyfs.registry.documents import DOCKER_MANIFEST, make_document
from lazyfs.registry.fileblobs import FileBlobs
from lazyfs.registry.files import Extent, TarFiles, read_small
from lazyfs.registry.reference import parse_name
from lazyfs.registry.tarindex import normalise

if TYPE_CHECKING:
    from lazyfs.registry.place import Document
    from lazyfs.registry.reference import FileReference

_MANIFEST_FILE = "manifest.json"
_CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
_LAYER_TYPE = "application/vnd.docker.image.rootfs.diff.tar"
_MAGICS = {b"\x1f\x8b": ".gzip", b"\x28\xb5\x2f\xfd": ".zstd"}
_HASH_BYTES = 1 * MIB
_SHOWN_NAMES = 10


class _Image(msgspec.Struct):
    Config: str
    Layers: list[str]
    RepoTags: list[str] | None = None


class _RootFs(msgspec.Struct):
    diff_ids: list[str]


class _Config(msgspec.Struct):
    rootfs: _RootFs


class DockerArchiveSource(FileBlobs):
    """place.ImageSource over a docker save archive."""

    def __init__(self, reference: FileReference) -> None:
        self._reference = reference
        self._files = TarFiles(reference.path)
        self._blobs: dict[Digest, Extent] = {}
        try:
            self._root = self._make_root()
        except BaseException:
            self._files.close()
            raise

    @property
    def name(self) -> str:
        return self._reference.text

    def root(self) -> Document:
        return self._root

    def document(self, digest: Digest) -> Document:
        if digest != self._root.digest:
            raise NotFoundError(f"{self.name}: no manifest {digest.short}")
        return self._root

    def _locate(self, digest: Digest) -> Extent:
        extent = self._blobs.get(digest)
        if extent is None:
            raise NotFoundError(f"{self.name}: no blob {digest.short}")
        return extent

    def close(self) -> None:
        self._files.close()

    # --- what docker save wrote -> manifest ------------------------------------------------------------------------

    def _make_root(self) -> Document:
        image = self._choose(self._read_images())
        config = read_small(self._files, self._resolve(image.Config), CONFIG_BYTES_MAX)
        try:
            diff_ids = shapes.from_json(config, _Config).rootfs.diff_ids
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{self.name}: {image.Config[:100]!r} is not an image's configuration") from error
        if len(diff_ids) != len(image.Layers) or len(diff_ids) > DEVICE_COUNT_MAX:
            raise FormatError(f"{self.name}: {len(image.Layers)} layers, but {len(diff_ids)} diff_ids in the config")
        config_digest = Digest.of(config)
        self._blobs[config_digest] = self._files.locate(self._resolve(image.Config))
        layers = [self._layer(member, Digest(diff_id)) for member, diff_id in zip(image.Layers, diff_ids, strict=True)]
        manifest = {
            "schemaVersion": 2,
            "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": _CONFIG_TYPE, "size": len(config), "digest": str(config_digest)},
            "layers": layers,
        }
        return make_document(msgspec.json.encode(manifest), DOCKER_MANIFEST, None, self.name)

    def _read_images(self) -> list[_Image]:
        try:
            data = read_small(self._files, _MANIFEST_FILE, MANIFEST_BYTES_MAX)
        except NotFoundError:
            is_oci = "oci-layout" in self._files.members
            raise FormatError(f"{self.name}: no {_MANIFEST_FILE}: not what docker save writes",
                              hint="try oci-archive:" if is_oci else "") from None
        try:
            return shapes.from_json(data, list[_Image])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FormatError(f"{self.name}: {_MANIFEST_FILE} is not the JSON expected") from error

    def _choose(self, images: list[_Image]) -> _Image:
        wanted, index = self._reference.tag, self._reference.index
        if index is not None:
            if index >= len(images):
                raise NotFoundError(f"{self.name}: no image number {index}; the archive holds {len(images)}",
                                    hint="the first one is :@0")
            return images[index]
        if not wanted and len(images) == 1:
            return images[0]
        names = [name for image in images for name in image.RepoTags or []]
        shown = ", ".join(names[:_SHOWN_NAMES])[:500] or "none"
        if not wanted:
            raise UsageError(f"{self.name}: {len(images)} images; names there: {shown}",
                             hint=f"add one: docker-archive:{self._reference.path}:NAME:TAG, or :@0 for the first")
        for image in images:
            if any(_same_name(name, wanted) for name in image.RepoTags or []):
                return image
        raise NotFoundError(f"{self.name}: no image of this name; names there: {shown}", hint="check the name")

    def _resolve(self, member: str) -> str:
        """The regular member that a name leads to."""
        name = normalise(member.encode(errors="surrogatepass"), self.name)
        for _ in range(SYMLINK_HOPS_MAX):
            found = self._files.members.get(name)
            if found is None or not found.target:
                return name
            name = found.target
        raise FormatError(f"{self.name}: {member[:100]!r}: a loop of links")

    def _layer(self, member: str, diff_id: Digest) -> dict[str, object]:
        """The descriptor of a layer, which can be read by its digest from now on."""
        extent = self._files.locate(self._resolve(member))
        with extent.stream(self.name) as stream:
            start = stream.read(4)
        suffix = next((text for magic, text in _MAGICS.items() if start.startswith(magic)), "")
        digest = self._hash(extent) if suffix else diff_id
        self._blobs[digest] = extent
        return {"mediaType": _LAYER_TYPE + suffix, "size": extent.size, "digest": str(digest)}

    def _hash(self, extent: Extent) -> Digest:
        sha = hashlib.sha256()
        with extent.stream(self.name) as stream:
            while piece := stream.read(_HASH_BYTES):
                sha.update(piece)
        return Digest("sha256:" + sha.hexdigest())


def _same_name(name: str, wanted: str) -> bool:
    """Whether docker means the same image by both; `wanted` is normalised."""
    try:
        known = parse_name(name)
    except LazyfsError:
        return False
    return f"{known.host}/{known.repository}:{known.tag}" == wanted
