"""
What a request to the mirror is about: end, registry, repository, reference. Pure.

Layer: mirror. Who calls: mirror.pulling. Distribution-spec v1.1, ends 1, 2, 3, 8a, 8b and 12. Which registry is meant,
in this order: `?ns=` (containerd, docker's containerd store); a first part of the path that is a host (`HOST/NAME`, or
`HOST__PORT/NAME`, for Podman and CRI-O, whose registries.conf knows locations only); else Docker Hub (docker's
registry-mirrors). Names are bytes from outside: what is no name is refused here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from lazyfs.errors import FormatError, LazyfsError
from lazyfs.image.digest import Digest
from lazyfs.registry.reference import DOCKER_HUB, RegistryReference, parse_name

_TARGET_CHARS_MAX = 8192
_FIELD_COUNT_MAX = 32
_END = re.compile(r"/v2/(?P<name>.+)/(?:(?P<kind>blobs|manifests|referrers)/(?P<what>[^/]+)|tags/list)\Z")
_OTHER_DIGEST = re.compile(r"(?!sha256:)[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+\Z")   # sha512, for example
_PORT = re.compile(r"__(\d{1,5})\Z")


class End(enum.Enum):
    """Of the API. The value: for logs and metrics."""

    PING = "ping"
    MANIFEST = "manifests"
    BLOB = "blobs"
    TAGS = "tags"
    REFERRERS = "referrers"


class Refusal(NamedTuple):
    """An answer with an error: status, one of the specification's codes, words."""

    status: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Route:
    """
    One request's object.

    Attributes:
        name: as it stood in the path.
        reference: registry and repository; its tag or digest is the manifest's that is asked for.
        digest: of the blob, manifest or subject that is asked for by digest.
        namespace: what `?ns=` said, to be said again in the answer; "": it was not there.
        query: its other fields, the first value of each.

    """

    end: End
    name: str
    reference: RegistryReference
    digest: Digest | None
    namespace: str
    query: dict[str, str]


def find_route(target: str) -> Route | Refusal | None:
    """What a request's target names; None: it is not of this API at all."""
    if len(target) > _TARGET_CHARS_MAX:
        return Refusal(414, "NAME_INVALID", "the target is too long")
    try:
        parts = urlsplit(target)
        path = unquote(parts.path, errors="strict")
        query = {key: values[0] for key, values in
                 parse_qs(parts.query, keep_blank_values=True, max_num_fields=_FIELD_COUNT_MAX).items()}
    except ValueError:
        return Refusal(400, "NAME_INVALID", "the target is malformed")
    if path in {"/v2", "/v2/"}:
        return Route(End.PING, "", RegistryReference(DOCKER_HUB, "", ""), None, query.pop("ns", ""), query)
    if not path.startswith("/v2/"):
        return None
    met = _END.match(path)
    return Refusal(404, "NAME_UNKNOWN", "no such end of the distribution API") if met is None else _of_end(met, query)


def _of_end(met: re.Match[str], query: dict[str, str]) -> Route | Refusal:
    namespace = query.pop("ns", "")
    end, what = End(met["kind"] or "tags"), met["what"] or ""
    digest = None
    if end in {End.BLOB, End.REFERRERS} or ":" in what:
        try:
            digest = Digest(what)
        except FormatError:
            code = "BLOB_UNKNOWN" if end is End.BLOB else "MANIFEST_UNKNOWN"
            return (Refusal(404, code, "only sha256 digests are mirrored") if _OTHER_DIGEST.match(what) else
                    Refusal(400, "DIGEST_INVALID", "not a digest"))
    reference = _reference(met["name"], namespace, "" if digest is not None else what, digest)
    if reference is None:
        return Refusal(400, "NAME_INVALID", "not the name of a repository or tag, or not of a registry")
    return Route(end, met["name"], reference, digest, namespace, query)


def _reference(name: str, namespace: str, tag: str, digest: Digest | None) -> RegistryReference | None:
    """None: these are no names."""
    host, repository = (namespace, name) if namespace else _split(name)
    ending = f"@{digest}" if digest is not None else f":{tag or 'latest'}"
    try:
        found = parse_name(f"{host}/{repository}{ending}")
    except LazyfsError:
        return None
    # What stands for another name than it says is not to be guessed at: `ns` without a dot would be Docker Hub's.
    is_same = found.repository in {repository, f"library/{repository}"} and (
        found.host in {host, DOCKER_HUB})
    return found if is_same and found.tag == ("" if digest is not None else tag or "latest") else None


def _split(name: str) -> tuple[str, str]:
    """Registry and repository of a path without `ns`."""
    first, slash, rest = name.partition("/")
    host = _PORT.sub(r":\1", first)
    if slash and ("." in first or host != first or first == "localhost"):
        return host, rest
    return DOCKER_HUB, name
