"""The registry of an image: reachable, its clock and ours, TLS, credentials, the image itself. Layer: doctor."""

from __future__ import annotations

import email.utils
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from lazyfs.doctor.results import failed, ok, warning
from lazyfs.errors import AuthError, LazyfsError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lazyfs.doctor.results import Result, Subject
    from lazyfs.registry import RegistryOptions
    from lazyfs.registry.place import ImageSource

_DEADLINE_S = 4.0                # of a request, which is made twice: a registry that takes longer is no good for starts
_CLOCK_WARNING_S, _CLOCK_FAILED_S = 10.0, 300.0   # tokens and certificates allow for some seconds, none for minutes


def check_registry(subject: Subject) -> Iterator[Result]:
    """Whatever it answers (401, 404), it is there; its Date says what time it has."""
    from lazyfs.registry.client import RegistryClient  # noqa: PLC0415 - only with an image
    from lazyfs.registry.reference import RegistryReference, parse_reference  # noqa: PLC0415
    from lazyfs.registry.transport import Call  # noqa: PLC0415

    if not subject.image:
        return
    reference = parse_reference(subject.image)
    if not isinstance(reference, RegistryReference):
        return
    client = RegistryClient(reference.host, reference.repository, _options(subject))
    try:
        deadline = time.monotonic() + _DEADLINE_S
        url = client.url(f"manifests/{reference.tag}", deadline)
        with client.transport.send(Call("GET", url), deadline) as answer:
            scheme = url.partition(":")[0]
            yield ok("registry", f"{reference.host} answers, over {scheme}")
            yield from judge_clock(answer.headers.get("Date", ""), time.time())
    except LazyfsError as error:
        yield failed("registry", str(error), error.hint or "look at network, proxy and DNS of this node")
    finally:
        client.close()


def judge_clock(date: str, now: float) -> Iterator[Result]:
    """`date`: a Date header; `now`: our time, seconds since 1970."""
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        yield warning("clock", "the registry does not say what time it has", "compare it by hand: date")
        return
    apart = abs(now - theirs)
    text = f"{apart:.0f} s apart from the registry's"
    hint = "set the clock: tokens and certificates are valid for a time (chrony, systemd-timesyncd)"
    if apart > _CLOCK_FAILED_S:
        yield failed("clock", text, hint)
    elif apart > _CLOCK_WARNING_S:
        yield warning("clock", text, hint)
    else:
        yield ok("clock", text)


def check_image(subject: Subject) -> Iterator[Result]:
    """The credentials that this node would use, for what a start needs: manifest, and a part of a blob."""
    from lazyfs.registry import open_source  # noqa: PLC0415 - only with an image

    if not subject.image:
        return
    source = open_source(subject.image, _options(subject))
    try:
        yield from _check_source(subject.image, source)
    except AuthError as error:
        yield failed("credentials", str(error), error.hint or "docker login, or see docs/credentials.md")
    except NotFoundError as error:
        yield failed("image", str(error), error.hint or "check the reference")
    except LazyfsError as error:
        yield failed("image", str(error), error.hint or "read the message")
    finally:
        source.close()


def _check_source(image: str, source: ImageSource) -> Iterator[Result]:
    from lazyfs.image.manifest import is_lazy  # noqa: PLC0415 - only with an image
    from lazyfs.image.oci import is_index, parse_index, parse_manifest  # noqa: PLC0415
    from lazyfs.registry.select import select_platform  # noqa: PLC0415

    document = source.root()
    if is_index(document.media_type, document.data):
        document = source.document(select_platform(parse_index(document.data, document.media_type), None).digest)
    manifest = parse_manifest(document.data, document.media_type)
    yield ok("credentials", f"{image} can be read")
    layer = manifest.layers[0]
    with source.read_range(layer.digest, 0, 1, time.monotonic() + _DEADLINE_S) as stream:
        stream.read(1)
    if is_lazy(manifest):
        yield ok("image", "is a lazy image, and parts of its blobs can be had")
    else:
        yield warning("image", "is an ordinary image: it will be downloaded and unpacked before it starts",
                      "make a lazy one: lazyfs convert")


def _options(subject: Subject) -> RegistryOptions:
    from lazyfs.registry.fields import from_config  # noqa: PLC0415 - only with an image

    return replace(from_config(subject.config.registry), request_deadline_s=_DEADLINE_S, retry_count=1)
