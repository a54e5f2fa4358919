"""containerd's filter language: written and read again, and compared with a plain model; hostile text is refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

from snapshotter.failures import SnapshotInvalidError
from snapshotter.filters import FILTER_CHARS_MAX, parse_filters
from snapshotter.model import Kind, SnapshotInfo

Selector = tuple[tuple[str, ...], str, str]
TEXTS = st.sampled_from(["a", "b", "a.b", "sha256:00", 'a"b', "a,b", "a b", "é", "\n", "\\", ""])
INFOS = st.builds(SnapshotInfo, name=TEXTS, parent=TEXTS, kind=st.sampled_from(Kind),
                  labels=st.dictionaries(TEXTS.filter(bool), TEXTS.filter(bool), max_size=3))
PATHS = st.one_of(st.sampled_from([("kind",), ("name",), ("parent",), ("labels",), ("other",), ("name", "a")]),
                  TEXTS.map(lambda key: ("labels", key)))
SELECTORS = st.tuples(PATHS, st.sampled_from(["", "==", "!=", "~="]), TEXTS)


def written(selector: Selector) -> str:
    path, operator, value = selector
    return ".".join(field if re.fullmatch(r"\w+", field, re.ASCII) else quoted(field) for field in path) + (
        operator + (quoted(re.escape(value) if operator == "~=" else value)) if operator else "")


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("é", "\\u00e9") + '"'


def holds(selector: Selector, info: SnapshotInfo) -> bool:
    path, operator, value = selector
    fields = {("kind",): info.kind.value, ("name",): info.name, ("parent",): info.parent,
              **{("labels", key): text for key, text in info.labels.items()}}
    # names of other fields have no parts; containerd looks at the first only
    found = fields.get(path[:1] if path[0] != "labels" else path)
    match operator:
        case "":
            return found is not None
        case "==":
            return found == value
        case "!=":
            return (found or "") != value
    return value in (found or "")


@given(st.lists(st.lists(SELECTORS, min_size=1, max_size=3), max_size=3), INFOS)
def test_filters_agree_with_the_model(filters: list[list[Selector]], info: SnapshotInfo) -> None:
    match = parse_filters([",".join(map(written, selectors)) for selectors in filters])
    expected = not filters or any(all(holds(selector, info) for selector in selectors) for selectors in filters)
    event("matches" if expected else "does not")
    assert match(info) == expected


@given(st.one_of(st.text(), st.text(alphabet='labels.name=!~,"/|\\x0u \n')))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        match = parse_filters([text])
    except SnapshotInvalidError:
        event("refused")
    else:
        event("read")
        match(SnapshotInfo("a", "", Kind.ACTIVE))


# What containerd's own parser says of these (its pkg/filters tests, and its grammar).
@pytest.mark.parametrize(("text", "expected"), [
    ("", True), ("name==foo", True), ("name == foo", True), ("name!=foo", False), ("name!=bar", True),
    ("name~=fo", True), ("name~=^o", False), ("name~=/^f.o$/", True), ("name~=|^f.o$|", True), ('name=="foo"', True),
    ("name~=/(/", False), ("name,labels.foo", True), ("labels.foo==true", True), ("labels.bar", False),
    ("labels", False), ("parent", True), ("parent==", None), ("other", False), ("other!=foo", True),
    ('labels."very complex label"==something', True), ('labels."very complex label"~=some', True),
    ("kind==active", True), ("kind==committed", False), ("kind==active,name==bar", False),
    ("labels.dotted.key==x", True), ('name=="\\x66\\157\\u006f"', True), ("name==foo ,kind==active", None),
    ("name===foo", None), ("name=foo", None), ("name==/foo/", None), ("name==|foo", None), ("==foo", None),
    ("name==foo,", None), (",name", None), ('name=="foo', None), ('name=="\\q"', None), ('name=="\\400"', None),
    ("name.", None), ("name==.foo", None), ("na-me==x", None), ("name==a\x00b", None),
])
def test_filters_that_containerd_knows(text: str, expected: bool | None) -> None:
    labels = {"foo": "true", "very complex label": "something", "dotted.key": "x"}
    info = SnapshotInfo("foo", "", Kind.ACTIVE, labels)
    if expected is None:
        with pytest.raises(SnapshotInvalidError):
            parse_filters([text])
    else:
        assert parse_filters([text])(info) is expected


def test_several_filters_match_if_any_does() -> None:
    match = parse_filters(["name==a", "kind==view,name==b"])
    assert [match(SnapshotInfo(name, "", Kind.ACTIVE)) for name in "abc"] == [True, False, False]
    assert match(SnapshotInfo("b", "", Kind.VIEW))
    assert parse_filters([])(SnapshotInfo("b", "", Kind.VIEW))


def test_filters_are_bounded() -> None:
    with pytest.raises(SnapshotInvalidError, match="at most"):
        parse_filters(["name==" + "a" * FILTER_CHARS_MAX])
    with pytest.raises(SnapshotInvalidError, match="at most"):
        parse_filters(["name"] * 1000)
