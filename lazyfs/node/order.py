"""
A mount order: what is to be mounted where, as it travels from the command line (or the snapshotter) to the worker.

Layer: node; light to import. It may hold a password: it goes over the control socket only, and has no repr.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from lazyfs import limits
from lazyfs.errors import UsageError

if TYPE_CHECKING:
    from lazyfs.registry import RegistryOptions

READ_TIMEOUT_S_MIN, READ_TIMEOUT_S_MAX = 0.1, 3600.0


@dataclass(frozen=True, slots=True)
class MountOrder:
    """
    One mount.

    Attributes:
        image: as the user wrote it.
        target: absolute, resolved.
        driver: auto, erofs or fuse.
        platform: os/arch[/variant]; None: this machine's.
        prefetch: whether to fetch the hot blob at once.
        read_timeout_s: a read without its bytes by then ends with an errno.
        registry: registry.RegistryOptions as registry.fields writes them.
        full_copy: off, on or idle: as cache.full_copy; "": as that says.
        by_node: instead of these, what the node's configuration says about registries whenever they are asked.
        seed: from the worker's starter only: a file with the bootstrap layer; the worker removes it.
        document, document_type: likewise: the image's manifest (base64) and its media type.
        layer: likewise: digest, size and uncompressed size of the bootstrap layer; sizes of 0: the digest is that of
            the uncompressed layer, which is in `bootstrap_dir` or was mounted before.
        checked: likewise: the EROFS image in it is valid.
        origin: likewise: where the registry was found (RegistryOptions.origin), "": not at all.
        bootstrap_dir: a directory of root's that holds the unpacked bootstrap layer (the snapshotter's), or None; with
            it, and `layer`, no registry is asked before data is read.
        manifest: digest of its manifest, if it is known already: where to look for signatures; never believed.
        record: what is read is to be recorded: every read must reach the worker, and little but what was asked for.

    """

    image: str
    target: str
    driver: str = "auto"
    platform: str | None = None
    prefetch: bool = True
    read_timeout_s: float = limits.READ_DEADLINE_S
    registry: dict[str, Any] = field(default_factory=dict, repr=False)
    seed: str | None = None
    document: str | None = field(default=None, repr=False)
    document_type: str = ""
    layer: tuple[str, int, int] | None = None
    checked: bool = False
    origin: str = ""
    bootstrap_dir: str | None = None
    record: bool = False
    by_node: bool = False
    manifest: str = ""
    full_copy: str = ""

    def __post_init__(self) -> None:
        if self.driver not in {"auto", "erofs", "fuse"}:
            raise UsageError(f"unknown driver {self.driver!r:.40}: expected auto, erofs or fuse")
        if self.full_copy not in {"", "off", "on", "idle"}:
            raise UsageError(f"full copy {self.full_copy!r:.40}: expected off, on or idle")
        if not READ_TIMEOUT_S_MIN <= self.read_timeout_s <= READ_TIMEOUT_S_MAX:
            raise UsageError(f"read timeout {self.read_timeout_s} s: expected "
                             f"{READ_TIMEOUT_S_MIN:g} to {READ_TIMEOUT_S_MAX:g}")
        if not self.target.startswith("/"):
            raise UsageError(f"mount target {self.target!r:.100} is not absolute")

    def registry_options(self) -> RegistryOptions:
        """What the registry client wants."""
        if self.by_node:
            from lazyfs.node.noderegistry import node_registry  # noqa: PLC0415 - likewise

            return node_registry()
        from lazyfs.registry.fields import from_fields  # noqa: PLC0415 - the command line needs it to start a worker

        options = from_fields(self.registry)
        return replace(options, origin=self.origin) if self.origin else options

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_record(cls, data: dict[str, Any]) -> Self:
        """As from_json, of a record that another version of us may have written: what it says beyond us is left out."""
        return cls.from_json({name: data[name] for name in cls.__slots__ if name in data})

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Raises UsageError: not a mount order."""
        try:
            layer = data.get("layer")
            return cls(**{**data, "layer": None if layer is None else (str(layer[0]), int(layer[1]), int(layer[2]))})
        except (TypeError, ValueError, AttributeError, LookupError) as error:
            raise UsageError(f"malformed mount order: {error}") from error
