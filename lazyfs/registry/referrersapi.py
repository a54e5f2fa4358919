"""
The referrers API of a registry: which artifacts refer to a manifest.

Layer: registry; used by remote.py. Distribution-spec v1.1 "Listing Referrers". The registry itself is asked, no mirror:
what a proxy of blobs answers here says nothing.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from lazyfs.image.oci import OCI_INDEX
from lazyfs.limits import MANIFEST_BYTES_MAX
from lazyfs.registry.addresses import origin_of, resolve
from lazyfs.registry.status import raise_for_status

if TYPE_CHECKING:
    from lazyfs.image.digest import Digest
    from lazyfs.registry.client import RegistryClient

PAGE_COUNT_MAX = 4          # registries filter by type: more than a page is odd
_NO_SUCH_API = {400, 404, 405, 501}
_NEXT = re.compile(r'\s*<([^<>]{1,4096})>\s*;[^,]*\brel="?next"?')


def list_referrers(client: RegistryClient, subject: Digest, artifact_type: str, deadline: float) -> list[bytes] | None:
    """
    The API's pages, unchecked; None: the registry does not have it.

    Raises:
        SourceError: no answer in time, or none that makes sense. AuthError: no right to it.

    """
    url = client.url(f"referrers/{subject}?" + urlencode({"artifactType": artifact_type}), deadline)
    pages: list[bytes] = []
    while len(pages) < PAGE_COUNT_MAX:
        with client.send("GET", url, deadline, headers={"Accept": OCI_INDEX}) as answer:
            kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if answer.status in _NO_SUCH_API or (answer.status == 200 and kind != OCI_INDEX):
                return None       # a 200 of another kind: something that answers every path
            if answer.status != 200:
                raise_for_status(answer, f"what refers to {subject.short} in {client.host}/{client.repository}")
            link = answer.headers.get("Link", "")
            pages.append(answer.read_all(MANIFEST_BYTES_MAX))
        following = _NEXT.match(link)
        if following is None:
            break
        url = resolve(url, following[1])
        if origin_of(url) != client.endpoint.origin(deadline):
            break
    return pages
