"""
Lists for the mirror's clients: tags, and what refers to a manifest. From the registry, now; nothing is kept.

Layer: mirror. Who calls: mirror.pulling. Distribution-spec v1.1, ends 8a, 8b and 12. Pages are the registry's own;
their Link leads to the mirror. What a registry sends is checked: it is served on as JSON of the right shape.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import parse_qs, urlencode, urlsplit

import msgspec

from lazyfs import shapes
from lazyfs.errors import FormatError, NotFoundError
from lazyfs.limits import MANIFEST_BYTES_MAX, MIB
from lazyfs.registry.documents import OCI_INDEX
from lazyfs.registry.status import raise_for_status

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lazyfs.mirror.route import Route
    from lazyfs.mirror.upstream import Upstream

_TAGS_BYTES_MAX: Final = 4 * MIB
_NEXT = re.compile(r'\s*<([^<>]{1,4096})>\s*;[^,]*\brel="?next"?')
_PASSED_ON: Final = {"n", "last", "artifactType"}      # of a query
_PAGING: Final = {"n", "last", "nextPageToken", "next_page", "page", "page_size", "artifactType"}   # of a Link's


class Page(NamedTuple):
    """A body with its kind; `headers`: others."""

    content_type: str
    data: bytes
    headers: dict[str, str]


class _Tags(msgspec.Struct):
    tags: list[str] | None = None


class _Referrer(msgspec.Struct, rename="camel"):
    artifact_type: str | None = None


def tags(upstream: Upstream, route: Route) -> Page:
    """
    A page of tags. Blocking. Raises LazyfsError: it has none for us.

    Some registries send all of them at once, in no order, whatever was asked for: then order and pages are made here.
    """
    data, _, headers = _get(upstream, route, "tags/list", route.query, _TAGS_BYTES_MAX)
    try:
        found = shapes.from_json(data, _Tags).tags or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{route.reference.identity}: not a list of tags") from error
    if "Link" not in headers:
        found = sorted(found)
        found = found[found.index(route.query["last"]) + 1:] if route.query.get("last") in found else found
        count = int(route.query["n"]) if re.fullmatch(r"\d{1,9}", route.query.get("n", "")) else len(found)
        if 0 < count < len(found):
            found = found[:count]
            headers["Link"] = _link(route, "tags/list", "?" + urlencode({"n": count, "last": found[-1]}))
    name = route.reference.repository
    return Page("application/json", json.dumps({"name": name, "tags": found}).encode(), headers)


def referrers(upstream: Upstream, route: Route) -> Page:
    """
    What refers to the route's digest: an index; filtered here where the registry did not. Blocking.

    Raises:
        NotFoundError: the registry does not have this API: clients then look for the tag `sha256-...`.
        LazyfsError: it has none for us.

    """
    wanted = route.query.get("artifactType", "")
    data, kind, headers = _get(upstream, route, f"referrers/{route.digest}", route.query, MANIFEST_BYTES_MAX)
    try:
        index = json.loads(data)
        listed = shapes.from_plain(index["manifests"], list[_Referrer])
    except (ValueError, KeyError, TypeError, RecursionError, msgspec.ValidationError):
        raise NotFoundError(f"{route.reference.identity}: no referrers API") from None
    if kind != OCI_INDEX:
        raise NotFoundError(f"{route.reference.identity}: no referrers API")
    if wanted and "artifactType" not in headers.get("OCI-Filters-Applied", ""):
        index["manifests"] = [raw for raw, one in zip(index["manifests"], listed, strict=True)
                              if one.artifact_type == wanted]
        data = json.dumps(index).encode()
        headers["OCI-Filters-Applied"] = "artifactType"
    return Page(OCI_INDEX, data, headers)


def _get(upstream: Upstream, route: Route, path: str, query: Mapping[str, str],
         bytes_max: int) -> tuple[bytes, str, dict[str, str]]:
    """Body, kind, headers to pass on."""
    passed = {key: value for key, value in query.items() if key in _PASSED_ON | _PAGING}
    with upstream.small(route.reference) as (client, deadline):
        url = client.url(path, deadline) + (f"?{urlencode(passed)}" if passed else "")
        with client.send("GET", url, deadline, headers={"Accept": f"{OCI_INDEX}, application/json"}) as answer:
            if answer.status != 200:
                raise_for_status(answer, f"{path} of {route.reference.identity}")
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            headers = {}
            if "artifactType" in answer.headers.get("OCI-Filters-Applied", ""):
                headers["OCI-Filters-Applied"] = "artifactType"
            following = _NEXT.match(answer.headers.get("Link", ""))
            if following is not None:
                headers["Link"] = _link(route, path, following[1])
            return answer.read_all(bytes_max), kind, headers


def _link(route: Route, path: str, target: str) -> str:
    """The next page, of the mirror: as this one was asked for, with what the registry says about its place."""
    try:
        found = {key: values[0] for key, values in parse_qs(urlsplit(target).query, max_num_fields=16).items()}
    except ValueError:
        found = {}
    query = {key: value for key, value in found.items() if key in _PAGING}
    if route.namespace:
        query["ns"] = route.namespace
    return f'</v2/{route.name}/{path}?{urlencode(query)}>; rel="next"'
