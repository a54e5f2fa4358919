"""
Where an image is, as the user writes it: skopeo's transport syntax.

    docker://host[:port]/repository[:tag][@sha256:...]     a bare name means this; Docker Hub's short names too
    oci:DIR[:TAG]   oci:DIR@sha256:...                      an image-layout directory
    oci-archive:FILE[:TAG]                                  a tar of one
    docker-archive:FILE[:REPOSITORY:TAG | :@INDEX]          what docker save writes

Layer: registry, no I/O. Who calls: opening.py, cli. Grammar of names: distribution-spec v1.1 "Pulling manifests" and
distribution/reference (which first part of a name is a host). Parsing raises UsageError and nothing else.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lazyfs.errors import FormatError, UsageError
from lazyfs.image.digest import Digest

EXPECTED = "docker://HOST/REPOSITORY[:TAG], oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE"
DOCKER_HUB = "docker.io"
_TEXT_CHARS_MAX = 8192
_NAME_CHARS_MAX = 255  # distribution/reference: NameTotalLengthMax
_DOMAIN_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_DOMAIN_LABEL}(?:\.{_DOMAIN_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::([0-9]{{1,5}}))?\Z")
_PART = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PART}(?:/{_PART})*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_OTHER_TRANSPORTS = frozenset(
    {"containers-storage", "dir", "docker-daemon", "ostree", "sif", "tarball", "http", "https", "file"})


class FileTransport(enum.Enum):
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """
    An image in a registry. `host` as in messages and auth files (docker.io for Docker Hub); `tag` is never empty
    unless there is a digest, which counts more.
    """

    host: str
    repository: str
    tag: str
    digest: Digest | None = None

    @property
    def identity(self) -> str:
        """The place without tag and digest."""
        return f"docker://{self.host}/{self.repository}"

    @property
    def text(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.identity}{tag}{f'@{self.digest}' if self.digest else ''}"


@dataclass(frozen=True, slots=True)
class FileReference:
    """
    An image in a directory or archive. `tag`: its name in there, empty for "the only one"; `index`: its number in
    a docker-archive's manifest.json.
    """

    transport: FileTransport
    path: Path
    tag: str = ""
    digest: Digest | None = None
    index: int | None = None

    @property
    def identity(self) -> str:
        return f"{self.transport.value}:{self.path.absolute()}"

    @property
    def text(self) -> str:
        if self.digest is not None:
            return f"{self.transport.value}:{self.path}@{self.digest}"
        ending = f":@{self.index}" if self.index is not None else f":{self.tag}" if self.tag else ""
        return f"{self.transport.value}:{self.path}{ending}"


Reference = RegistryReference | FileReference


def parse_reference(text: str) -> Reference:
    """
    The reference that `text` is.

    Raises:
        UsageError: it is none; says what was expected.

    """
    if len(text) > _TEXT_CHARS_MAX or any(c < " " or c == "\x7f" for c in text):
        raise UsageError(f"not an image reference: {text[:100]!r}", hint=f"expected {EXPECTED}")
    scheme, colon, rest = text.partition(":")
    if colon and scheme == "docker":
        if not rest.startswith("//"):
            _refuse(text, "two slashes after docker:")
        return parse_name(rest[2:])
    if colon and scheme in {one.value for one in FileTransport}:
        return _parse_file(FileTransport(scheme), rest, text)
    if colon and (scheme in _OTHER_TRANSPORTS or rest.startswith("//")):
        _refuse(text, EXPECTED)
    if text.startswith((".", "/", "~")):
        raise UsageError(f"{text[:200]!r} looks like a path", hint=f"did you mean oci:{text[:200]} ?")
    return parse_name(text)


def parse_name(text: str) -> RegistryReference:
    """`[host/]repository[:tag][@digest]`, normalised as docker does. Raises UsageError."""
    if "@" in text and "@sha256:" not in text and "@sha512:" not in text:
        # user:password@host is not echoed: this goes to terminals and logs.
        raise UsageError("an image reference holds an @ that no digest follows",
                         hint="credentials go into --username; a digest is @sha256:<64 hex digits>")
    name, at, digest_text = text.partition("@")
    digest = _parse_digest(digest_text) if at else None
    head, slash, tail = name.rpartition("/")
    tail, colon, tag = tail.partition(":")
    path = head + slash + tail
    if colon and not _TAG.match(tag):
        _refuse(text, "a tag of at most 128 letters, digits, dots, dashes and underscores")
    host, repository = _split_host(path)
    port = _HOST.match(host)
    if port is None or (port[1] and not 0 < int(port[1]) < 65536):
        _refuse(text, "a host name, with a port of 1 to 65535 if any")
    if len(repository) > _NAME_CHARS_MAX or not _REPOSITORY.match(repository):
        _refuse(text, "a repository name in lower case, like library/nginx")
    return RegistryReference(host, repository, tag or ("" if digest else "latest"), digest)


def _split_host(path: str) -> tuple[str, str]:
    """The first part is a host if it has a dot, a colon or a capital, or is localhost; else the host is Docker Hub."""
    first, slash, rest = path.partition("/")
    if not slash or not ("." in first or ":" in first or first == "localhost" or first.lower() != first):
        host, repository = DOCKER_HUB, path
    else:
        host, repository = first, rest
    if host in {"index.docker.io", "registry-1.docker.io"}:
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return host, repository


def _parse_digest(text: str) -> Digest:
    try:
        return Digest(text)
    except FormatError:
        raise UsageError(f"not a digest: {text[:100]!r}", hint="expected sha256: and 64 hex digits") from None


def _parse_file(transport: FileTransport, rest: str, text: str) -> FileReference:
    path, at, digest_text = rest.partition("@sha256:")
    if at and transport is FileTransport.OCI and not path.endswith(":"):
        return FileReference(transport, _path(path, text), digest=_parse_digest(f"sha256:{digest_text}"))
    path, colon, name = rest.partition(":")
    if colon and not name:
        _refuse(text, "a tag after the colon")
    if transport is FileTransport.DOCKER_ARCHIVE:
        if name.startswith("@"):
            if not re.match(r"@[0-9]{1,5}\Z", name):
                _refuse(text, "a number after @")
            return FileReference(transport, _path(path, text), index=int(name[1:]))
        if name:
            named = parse_name(name)
            name = f"{named.host}/{named.repository}:{named.tag}"
    elif name and not re.match(r"[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,254}\Z", name):
        # image-spec annotations.md: what org.opencontainers.image.ref.name may hold
        _refuse(text, "a tag of letters, digits and . _ : @ / + -")
    return FileReference(transport, _path(path, text), name)


def _path(path: str, text: str) -> Path:
    if not path:
        _refuse(text, "a path after the transport")
    return Path(path)


def _refuse(text: str, expected: str) -> NoReturn:
    # Whatever stands before an @ may be a password.
    shown = "…@" + text.rpartition("@")[2] if "@" in text else text
    raise UsageError(f"not an image reference: {shown[:200]!r}", hint=f"expected {expected}")
