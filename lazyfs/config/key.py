"""
One key of the configuration, and how a section's dataclass says what it is.

Layer: config. Who calls: config.table and the modules with sections beside it.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from lazyfs.config.kinds import Kind


class Key(NamedTuple):
    """
    One key.

    Attributes:
        path: as in messages: section.name.
        unit: of a number, else empty.
        restart: a running daemon cannot change it.

    """

    section: str
    name: str
    kind: Kind
    default: Any
    text: str
    unit: str
    restart: bool

    @property
    def path(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"LAZYFS_{self.section}_{self.name}".upper()


def key(kind: Kind, default: object, text: str, *, unit: str = "", restart: bool = False) -> Any:
    """A field of a section: its kind, default and description."""
    return field(default=default, metadata={"kind": kind, "text": text, "unit": unit, "restart": restart})
