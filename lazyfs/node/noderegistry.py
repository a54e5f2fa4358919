"""
What this node's configuration says about registries: for mounts that bring no options of their own.

Layer: node; light to import. Who calls: the daemon's worker sets it once, before it serves; node.order asks. It is not
in a mount's record, so a configuration that is changed (lazyfs daemon upgrade) holds for all mounts there are.
State: one value of the process; never changed once a mount is served.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.config import Registry
    from lazyfs.registry import RegistryOptions

_set: list[RegistryOptions] = []


def set_node_registry(settings: Registry) -> None:
    """`settings`: section [registry] of the configuration."""
    from lazyfs.registry.fields import from_config  # noqa: PLC0415 - the command line needs none of it

    _set[:] = [from_config(settings)]


def node_registry() -> RegistryOptions:
    """The node's; where nobody has set it (a worker without a daemon), the defaults."""
    from lazyfs.registry import RegistryOptions  # noqa: PLC0415

    return _set[0] if _set else RegistryOptions()
