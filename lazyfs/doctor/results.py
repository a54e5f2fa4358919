"""What a check gets and says. Layer: doctor."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyfs.config import Config


class Status(enum.StrEnum):
    """`WARNING`: it works, but not as well, or not for ever."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """One line. `hint`: what to do; empty if it is ok."""

    name: str
    status: Status
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.status:<8} {self.name}: {self.text}{f' → {self.hint}' if self.hint else ''}"

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "status": self.status.value, "text": self.text, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at. `image`: a reference whose registry and credentials shall be tried, or empty."""

    config: Config
    image: str = ""
    containerd_file: str = "/etc/containerd/config.toml"


def ok(name: str, text: str) -> Result:
    return Result(name, Status.OK, text)


def warning(name: str, text: str, hint: str) -> Result:
    return Result(name, Status.WARNING, text, hint)


def failed(name: str, text: str, hint: str) -> Result:
    return Result(name, Status.FAILED, text, hint)
