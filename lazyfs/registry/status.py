"""
What an HTTP status other than the expected one means.

Layer: registry. Distribution-spec v1.1 "Error Codes": a body {"errors": [{"code", "message"}]}, of which the code is
shown; free text of a server is shown bounded and with control characters escaped.
"""

from __future__ import annotations

import datetime as dt
import email.utils
from typing import TYPE_CHECKING, NoReturn

import msgspec

from lazyfs import shapes
from lazyfs.errors import AuthError, LazyfsError, NotFoundError, RateLimitedError, SourceError
from lazyfs.limits import KIB

if TYPE_CHECKING:
    from lazyfs.registry.transport import HttpResponse

_ERROR_BYTES_MAX = 64 * KIB
_RETRY_AFTER_MAX_S = 3600.0
# 408 and 425 ask for another try; 5xx may pass, except those that say "never".
_TRANSIENT = {408, 425}
_PERMANENT_5XX = {501, 505}


class _Error(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct):
    errors: list[_Error] = msgspec.field(default_factory=list)


def raise_for_status(answer: HttpResponse, what: str) -> NoReturn:
    """Raise what `answer` means; `what` names the thing asked for. Takes the connection back."""
    status, where = answer.status, answer.where
    retry_after_s = parse_retry_after(answer.headers.get("Retry-After"))
    detail = _detail(answer)
    text = f"{what}: {where}: status {status}{detail}"
    if status in {404, 410}:
        raise NotFoundError(f"{what}: not found ({where}{detail})", hint="check the name and the tag")
    if status == 416:
        raise SourceError(f"{text}: beyond the end", hint="the blob is shorter than promised", transient=False)
    if status in {401, 403}:
        raise AuthError(f"{text}: no right to it", hint="give --username, or run docker login; check the name")
    if status == 429 or (status == 503 and retry_after_s is not None):
        raise RateLimitedError(f"{text}: too many requests", hint="wait, or log in for a higher limit",
                               retry_after_s=retry_after_s)
    raise SourceError(text, transient=status in _TRANSIENT or (status >= 500 and status not in _PERMANENT_5XX))


def parse_retry_after(value: str | None) -> float | None:
    """Seconds, from a number of them or a date (RFC 9110 §10.2.3); bounded; None if there is nothing sensible."""
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        return min(float(text), _RETRY_AFTER_MAX_S)
    try:
        when = email.utils.parsedate_to_datetime(text)
        left_s = (when - dt.datetime.now(dt.UTC)).total_seconds()
    except (TypeError, ValueError, OverflowError):
        return None
    return min(max(left_s, 0.0), _RETRY_AFTER_MAX_S)


def _detail(answer: HttpResponse) -> str:
    """` (CODE: message)` out of an error's body, or nothing."""
    try:
        data = answer.read_all(_ERROR_BYTES_MAX)
        errors = shapes.from_json(data, _Errors).errors
    except (LazyfsError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""
    if not errors or not (errors[0].code or errors[0].message):
        return ""
    text = ": ".join(part for part in (errors[0].code, errors[0].message.split("?", 1)[0]) if part)
    shown = text[:200].encode("unicode_escape").decode()
    return f" ({shown})"
