"""
WWW-Authenticate: what a registry wants to see.

Layer: registry, no I/O. RFC 9110 §11.6.1 (challenges), distribution's token specification (Bearer realm, service,
scope). Whatever a server sends gives a list of challenges, possibly empty, within time linear in its (bounded) length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

_HEADER_CHARS_MAX = 8192
_WORD = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_PARAMETER = re.compile(rf'\s*({_WORD})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_WORD}))\s*(?:,|\Z)')
_SCHEME = re.compile(rf"[\s,]*({_WORD})(?=\s|,|\Z)")


@dataclass(frozen=True, slots=True)
class Challenge:
    """`scheme` and the parameters' names are in lower case."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=dict)


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """All challenges of all WWW-Authenticate headers; what cannot be read ends its header."""
    found = []
    for value in values:
        text, position = value[:_HEADER_CHARS_MAX], 0
        while scheme := _SCHEME.match(text, position):
            position = scheme.end()
            parameters: dict[str, str] = {}
            while met := _PARAMETER.match(text, position):
                quoted = met[2]
                parameters[met[1].lower()] = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else met[3]
                position = met.end()
            found.append(Challenge(scheme[1].lower(), parameters))
    return found


def merge_scopes(*texts: str) -> str:
    """The union of space-separated scopes `type:name:action,action`, in order of appearance."""
    merged: dict[str, list[str]] = {}
    for scope in " ".join(texts).split():
        resource, _, actions = scope.rpartition(":")
        if not resource:
            continue
        known = merged.setdefault(resource, [])
        known += [action for action in actions.split(",") if action and action not in known]
    return " ".join(f"{resource}:{','.join(actions)}" for resource, actions in merged.items())
