"""No secret gets through the logs, wherever in a record it stands; and what is logged cannot forge a record."""

from __future__ import annotations

import io
import json
import logging
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs import logs

SECRET = st.text(st.sampled_from("abcXYZ0189-_.~+/=!$*"), min_size=8, max_size=60).map("hunter2{}z".format)
PRINTABLE = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp"))
QUOTED = st.text(PRINTABLE, max_size=60).map("hunter2{}z".format)
AROUND = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=60)
HEADERS = st.sampled_from(["Authorization: Bearer {}", "authorization: Basic {}", "Proxy-Authorization={}",
                           "'Authorization': 'Bearer {}'", '"authorization": "Basic {}"', "Bearer {}"])
NAMES = st.sampled_from(["password", "Passwd", "identitytoken", "access_token", "refresh-token", "registry_token",
                         "client_secret", "api_key", "X-Amz-Signature", "X-Amz-Security-Token", "sig", "auth",
                         "X-Registry-Auth-Token", "cookie", "db_password_old"])
SHAPES = st.sampled_from(["{}={}", "{}: {}", '"{}": "{}"', "'{}': '{}'", '"{}":"{}"', r'\"{}\": \"{}\"', "?{}={}",
                          "&{}={}&b=c", "{}='{}'"])


def raise_it(message: str) -> None:
    raise RuntimeError(message)


def written(formatter: logging.Formatter, message: str, fields: dict[str, object] | None = None) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    try:
        raise_it(message)
    except RuntimeError as error:
        record = logging.LogRecord("lazyfs.x", logging.ERROR, __file__, 1, "%s", (message,),
                                   (RuntimeError, error, error.__traceback__))
    if fields is not None:
        record.fields = fields
    handler.emit(record)
    return stream.getvalue()


FORMATTERS = st.sampled_from([logs.TextFormatter(), logs.TextFormatter(journal=True), logs.JsonFormatter("test")])


@given(FORMATTERS, HEADERS, SECRET, AROUND)
def test_authorization(formatter: logging.Formatter, header: str, secret: str, around: str) -> None:
    assert secret not in written(formatter, f"{around} {header.format(secret)}\n{around}")


@given(FORMATTERS, NAMES, SHAPES, SECRET, AROUND)
def test_named_values(formatter: logging.Formatter, name: str, shape: str, secret: str, around: str) -> None:
    assert secret not in written(formatter, f"{around} {shape.format(name, secret)} {around}")


@given(FORMATTERS, NAMES, QUOTED)
def test_any_quoted_value(formatter: logging.Formatter, name: str, secret: str) -> None:
    found = written(formatter, json.dumps({name: secret, "b": 1}))
    assert secret not in found
    assert json.dumps(secret) not in found


@given(FORMATTERS, SECRET, st.sampled_from(["user:{}", "{}", "{}:x"]), AROUND)
def test_userinfo_of_urls(formatter: logging.Formatter, secret: str, shape: str, around: str) -> None:
    info = shape.format(quote(secret, safe=""))
    assert info not in written(formatter, f"{around} https://{info}@registry.example/v2/ {around}")


@given(FORMATTERS, SECRET, st.sampled_from("?#"), AROUND)
def test_queries_of_urls(formatter: logging.Formatter, secret: str, mark: str, around: str) -> None:
    text = f"{around} https://cdn.example/blob{mark}Expires=17&Whatever={secret} {around}"
    assert secret not in written(formatter, text)


@given(FORMATTERS, SECRET, NAMES)
def test_fields(formatter: logging.Formatter, secret: str, name: str) -> None:
    fields = {name: secret, "url": f"https://u:{quote(secret, safe='')}@h/?s={secret}", "count": 3}
    found = written(formatter, "x", fields)
    assert secret not in found
    assert quote(secret, safe="") not in found
    assert "registry.example/app" in written(formatter, "x", {"image": "registry.example/app"})


@given(AROUND)
def test_a_record_is_one_object_or_one_block(text: str) -> None:
    (line,) = written(logs.JsonFormatter("test"), text).splitlines()
    entry = json.loads(line)
    assert {"time", "level", "logger", "message", "pid", "program", "trace"} == set(entry)
    first, *rest = written(logs.TextFormatter(), text).split("\n")[:-1]
    assert " ERROR lazyfs.x: " in first
    assert rest
    assert all(one.startswith("    ") for one in rest)


@given(st.text(max_size=200))
def test_masking_twice_is_masking_once_or_more(text: str) -> None:
    once = logs.mask(text)
    assert logs.mask(once) == logs.mask(logs.mask(once))


@pytest.mark.parametrize("text", ["image registry.example/app:lazy is mounted on /mnt/a (erofs)",
                                  "lazyfs/app@sha256:0123 fetched 3 chunks in 0.1 s: 200 OK",
                                  "the registry wants credentials, or others than it was given",
                                  'Bearer realm="https://auth.example/token",service="registry"'])
def test_ordinary_messages_stay_as_they_are(text: str) -> None:
    assert logs.mask(text) == text


@pytest.mark.parametrize("unit", ["password", 'token="', "a://", "a://b@", "eyJaaaaaaaa.", "authorization", "?", '\\"',
                                  "Bearer ", "sig", "://a?", "-", "x" * 50 + "token"])
def test_hostile_text_takes_linear_time(unit: str) -> None:
    def took(size: int) -> float:
        text = (unit * size)[:size]
        best = 9.0
        for _ in range(3):
            begin = time.thread_time()
            logs.mask(text)
            best = min(best, time.thread_time() - begin)
        return best

    assert took(64 * 1024) < 1.0   # quadratic would be minutes: the bound is generous
