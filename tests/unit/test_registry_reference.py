"""References: what users write, and what they get when they write something else."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyfs.errors import UsageError
from lazyfs.registry import (
    FileReference,
    RegistryReference,
    check_apart,
    open_destination,
    open_source,
    parse_reference,
)
from lazyfs.registry.options import RegistryOptions, Secret

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(("text", "host", "repository", "tag"), [
    ("nginx", "docker.io", "library/nginx", "latest"),
    ("nginx:1.25", "docker.io", "library/nginx", "1.25"),
    ("docker://nginx", "docker.io", "library/nginx", "latest"),
    ("bitnami/redis", "docker.io", "bitnami/redis", "latest"),
    ("docker.io/nginx", "docker.io", "library/nginx", "latest"),
    ("index.docker.io/library/nginx", "docker.io", "library/nginx", "latest"),
    ("registry-1.docker.io/a/b:c", "docker.io", "a/b", "c"),
    ("ghcr.io/a/b/c:v1.0_x-y", "ghcr.io", "a/b/c", "v1.0_x-y"),
    ("localhost/app", "localhost", "app", "latest"),
    ("localhost:5000/app:1", "localhost:5000", "app", "1"),
    ("docker://127.0.0.1:5000/a/b__c.d-e:1", "127.0.0.1:5000", "a/b__c.d-e", "1"),
    ("[::1]:5000/app", "[::1]:5000", "app", "latest"),
    ("Registry/app", "Registry", "app", "latest"),
    ("host:80/oci:1", "host:80", "oci", "1"),
])
def test_names_are_normalised_as_docker_does(text: str, host: str, repository: str, tag: str) -> None:
    assert parse_reference(text) == RegistryReference(host, repository, tag)


def test_digest_counts_and_tag_may_stand_beside_it() -> None:
    plain = parse_reference(f"host.example/a@sha256:{HEX}")
    assert isinstance(plain, RegistryReference)
    assert (plain.tag, plain.digest and plain.digest.hex) == ("", HEX)
    both = parse_reference(f"host.example/a:1@sha256:{HEX}")
    assert isinstance(both, RegistryReference)
    assert (both.tag, both.digest and both.digest.hex) == ("1", HEX)
    assert both.text == f"docker://host.example/a:1@sha256:{HEX}"
    assert both.identity == "docker://host.example/a"


@pytest.mark.parametrize(("text", "path", "tag", "index"), [
    ("oci:dir", "dir", "", None),
    ("oci:/a/b:tag", "/a/b", "tag", None),
    ("oci:dir:host/name:1", "dir", "host/name:1", None),
    ("oci-archive:x.tar:v1", "x.tar", "v1", None),
    ("docker-archive:x.tar", "x.tar", "", None),
    ("docker-archive:x.tar:nginx", "x.tar", "docker.io/library/nginx:latest", None),
    ("docker-archive:x.tar:host:5000/a:1", "x.tar", "host:5000/a:1", None),
    ("docker-archive:x.tar:@2", "x.tar", "", 2),
])
def test_files(text: str, path: str, tag: str, index: int | None) -> None:
    found = parse_reference(text)
    assert isinstance(found, FileReference)
    assert (found.path, found.tag, found.index) == (Path(path), tag, index)


def test_oci_by_digest_and_identity_is_absolute() -> None:
    found = parse_reference(f"oci:dir@sha256:{HEX}")
    assert isinstance(found, FileReference)
    assert found.digest is not None
    assert found.digest.hex == HEX
    assert found.identity == f"oci:{Path.cwd()}/dir"


@pytest.mark.parametrize("text", [
    "", ":", "docker:", "docker:nginx", "docker://", "docker:///a", "https://host/a", "dir:/tmp/x", "docker-daemon:a:b",
    "UPPER/CASE", "host.example/UPPER", "a:", "a:b:c", "a:-tag", "a:" + "t" * 129, "host:0/a", "host:70000/a",
    "host:x/a",
    "-host.example/a", "a//b", "a/", "/abs/path", "./rel", "~/x", "oci:", "oci::tag", "oci:dir:", "oci:dir:bad tag",
    "docker-archive:", "docker-archive:f:@x", "docker-archive:f:UPPER", "a@sha256:12", f"a@sha512:{HEX}{HEX}",
    f"a@sha256:{HEX.upper()}", "a b", "a\nb", "a\0b", "host/" + "a" * 300, "a?x=1", "a#b", "x" * 10_000,
])
def test_anything_else_is_a_usage_error_that_says_what_was_expected(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["docker://kim:hunter2@host/a", "kim:hunter2@host/a", "kim:hunter2@host/a@sha256:12",
                                  f"kim:hunter2@host/a@sha256:{HEX}", "http://kim:hunter2@host/a",
                                  "ftp://kim:hunter2@host/a"])
def test_a_password_in_a_reference_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference(text)
    assert "hunter2" not in str(caught.value) + repr(caught.value) + caught.value.hint


@given(st.one_of(st.text(max_size=60), st.text("abA:/@.-_0oci~[]docker", max_size=40).map("docker://".__add__),
                 st.text("ab:/@s2.h56", max_size=40).map("oci:".__add__),
                 st.text("ab:/@s2.h56", max_size=40).map("docker-archive:".__add__)))
def test_parsing_gives_a_reference_or_a_usage_error(text: str) -> None:
    try:
        found = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(found.text).identity == found.identity


def test_what_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    for text in (f"docker-archive:{tmp_path}/x.tar", f"oci:{tmp_path}@sha256:{HEX}", f"host.example/a@sha256:{HEX}"):
        with pytest.raises(UsageError):
            open_destination(text, RegistryOptions())


def test_opening_a_registry_needs_no_registry() -> None:
    source = open_source("docker://registry.invalid/a:1", RegistryOptions())
    assert source.name == "docker://registry.invalid/a:1"
    source.close()


def test_options_hide_the_password() -> None:
    options = RegistryOptions(username="kim", password="hunter2")
    assert isinstance(options.password, Secret)
    assert options.password.reveal() == "hunter2"
    assert "hunter2" not in f"{options} {options!r} {options.password} {options.password!r}"
    with pytest.raises(UsageError):
        RegistryOptions(username="a:b", password="x")


@pytest.mark.parametrize(("source", "destination", "is_same"), [
    ("host:80/app:1", "docker://host:80/app:1", True), ("docker.io/library/app", "app:latest", True),
    ("host:80/app:1", "host:80/app:2", False), (f"host:80/app@sha256:{HEX}", "host:80/app:1", False),
    ("host:80/app:1", "oci:app:1", False), ("oci:d:1", "oci:./d:1", True), ("oci:d:1", "oci:d:2", False),
    ("oci:d", "oci:d", True), (f"oci:d@sha256:{HEX}", "oci:d:1", False), ("oci:link:1", "oci:d:1", True),
    ("oci-archive:a.tar:1", "oci-archive:a.tar:2", True), ("docker-archive:a.tar:app:1", "oci-archive:a.tar:2", True),
    ("oci-archive:a.tar:1", "oci-archive:b.tar:1", False),
])
def test_an_image_is_not_converted_into_its_own_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, destination: str, is_same: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("d")
    if not is_same:
        check_apart(source, destination)
        return
    with pytest.raises(UsageError, match="is the source itself"):
        check_apart(source, destination)
