"""
Mutated input of people, registries and other programs of a node: what each reader gives is a result, or one error.

That is every parser that tests/fuzz/test_format_mutations.py does not have, which are those of the format itself. Only
LazyfsError comes out (snapshotter: its own errors, which are such), whatever the bytes. `--fuzz N`: N times as many.
"""

from __future__ import annotations

import contextlib
import json
import random
from array import array
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lazyfs import config
from lazyfs.cache.presence import Identity, Record, decode_any, encode_checkpoint, encode_live
from lazyfs.errors import LazyfsError
from lazyfs.image.digest import Digest
from lazyfs.image.keys import load_public_keys
from lazyfs.image.signature import build_payload, parse_payload, parse_signatures
from lazyfs.node.housekeeping import Request
from lazyfs.node.rundir import ProcessIdentity, WorkerDir
from lazyfs.profile.contribution import read_contribution
from lazyfs.profile.recording import to_json
from lazyfs.registry.challenge import merge_scopes, parse_challenges
from lazyfs.registry.client import _check_range, _decode_tags
from lazyfs.registry.credentials import find_credentials
from lazyfs.registry.documents import make_document
from lazyfs.registry.hoststoml import parse_hosts_toml
from lazyfs.registry.kubelet import matches, read_providers
from lazyfs.registry.options import RegistryOptions
from lazyfs.registry.reference import parse_reference
from lazyfs.registry.status import parse_retry_after
from snapshotter.filters import parse_filters
from snapshotter.labels import check_labels
from tests.fuzz.test_format_mutations import mutate
from tests.profilekit import recording

if TYPE_CHECKING:
    from collections.abc import Callable

COUNT = 600
BOOT = bytes(range(16))
SIGNATURES = json.dumps({"layers": [
    {"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": "sha256:" + "0" * 64, "size": 200,
     "annotations": {"dev.cosignproject.cosign/signature": "YWJj"}}]}).encode()
PUBLIC_KEY = (b"-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEaxfR8uEsQkf4vOblY6RA8ncDfYEt\n"
              b"6zOg9KE5RdiYwpZP40Li/hp/m47n60p8D54WK84zV2sxXs7LtkBoN79R9Q==\n-----END PUBLIC KEY-----\n")
DEVICE = Identity(Digest.of(b"device"), 65536, 10 * 65536)


def text_of(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def utf8(data: bytes) -> str:
    """As protobuf has it."""
    return data.decode("utf-8", "replace")


def in_file(read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """Of a reader of files."""
    def parse(data: bytes, directory: Path) -> object:
        file = directory / "input"
        file.write_bytes(data)
        return read(file)

    return parse


def credentials(file: Path) -> object:
    return find_credentials(RegistryOptions(auth_file=file), "registry.example", "app/web")


def content_range(data: bytes, _directory: Path) -> object:
    text = data.decode("latin-1")
    answer: Any = SimpleNamespace(headers={"Content-Range": text}, url="https://registry.example/v2/", length=None)
    _check_range(answer, "blob", 100, 50)
    return None


def records(data: bytes, directory: Path) -> object:
    """All that a run directory says, and the same bytes everywhere."""
    there = WorkerDir(directory / "run")
    there.mounts.mkdir(parents=True, exist_ok=True)
    for path in (there.identity, there.keeper_identity, there.numbers, there.mounts / "1.json"):
        path.write_bytes(data)
    return there.worker(), there.keeper(), there.records(), there.read_numbers()


def evict(data: bytes, _directory: Path) -> object:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return Request.from_json(value) if isinstance(value, dict) else None


def checkpoint(data: bytes, _directory: Path) -> object:
    found = decode_any(data, DEVICE.digest, None)
    assert found is None or len(found.present) == len(found.sums)
    return found


def live(data: bytes, _directory: Path) -> object:
    found = decode_any(data, DEVICE.digest, BOOT)
    assert found is None or len(found.present) == len(found.sums)
    return found


CHALLENGE = (b'Bearer realm="https://auth.example/token",service="registry",scope="repository:a:pull", '
             b'Basic x="\\""')
MANIFEST = b'{"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": {}}'
HOSTS = (b'server = "https://a.example"\n[host."https://b.example/v2"]\ncapabilities = ["pull"]\n'
         b'skip_verify = true\nca = ["/a.crt"]\nclient = [["/c", "/k"]]\n[host."http://c".header]\nx = ["y"]\n')
DOCKER = (b'{"auths": {"https://registry.example/v1/": {"auth": "a2ltOnNlY3JldA=="}, "registry.example/app": '
          b'{"username": "kim", "password": "x", "identitytoken": ""}}, "credHelpers": {"other": "none"}}')
KUBELET = (b"apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: ecr\n"
           b"  apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: ['*.example']\n"
           b"  defaultCacheDuration: 12h\n  args: [get]\n  env: [{name: A, value: b}]\n")
CONFIGURATION = (b"[daemon]\nhang_s = 10\nread_timeout_s = 3.5\n[cache]\nquota_bytes = '20GiB'\n"
                 b"free_floor_bytes = '5%'\n[registry.host.'a.example']\ninsecure = true\n[log]\nlevel = 'info'\n")
RECORD = Record(BOOT, bytearray(b"\1\0" * 5), array("Q", range(10)))

TARGETS: dict[str, tuple[Callable[[bytes, Path], object], bytes]] = {
    "challenge": (lambda data, _: parse_challenges([text_of(data)]), CHALLENGE),
    "scopes": (lambda data, _: merge_scopes(text_of(data)), b"repository:a/b:pull,push registry:catalog:* a:b:"),
    "retry-after": (lambda data, _: parse_retry_after(text_of(data)), b"Wed, 21 Oct 2026 07:28:00 GMT"),
    "content-range": (content_range, b"bytes 100-149/1000"),
    "tags": (lambda data, _: _decode_tags(data, "tags"), b'{"name": "app", "tags": ["a", "b", null, ""]}'),
    "document": (lambda data, _: make_document(data, "", None, "x"), MANIFEST),
    "reference": (lambda data, _: parse_reference(text_of(data)), b"docker://a.example:50/a/b:tag@sha256:" + b"0" * 64),
    "hosts.toml": (lambda data, _: parse_hosts_toml(data.decode("utf-8", "replace"), Path("/x/hosts.toml")), HOSTS),
    "docker-config": (in_file(credentials), DOCKER),
    "kubelet": (in_file(read_providers), KUBELET),
    "kubelet-pattern": (lambda data, _: matches(text_of(data), "registry.example:5000/app"), b"*.example:5000/[a-z]?"),
    "configuration": (in_file(lambda file: config.check(str(file), {})), CONFIGURATION),
    "settings": (lambda data, _: config.from_plain(json_object(data)),
                 json.dumps(config.to_plain(config.Config())).encode()),
    "contribution": (lambda data, _: read_contribution(data),
                     to_json(recording([(0, 0, 4096, 1.0), (0, 8192, 12288, 2.5)], image="", containers=("",)))),
    "worker-record": (records, json.dumps(asdict(ProcessIdentity(1, 1, "x"))).encode()),
    "numbers": (records, b"[12, 13]"),
    "evict-request": (evict, b'{"op": "evict", "quota": "20GiB", "floor": "5%", "image": "a", "all": true}'),
    "filters": (lambda data, _: parse_filters([utf8(data)]),
                rb'name~="a.*\x41",labels."containerd.io/a"==b,parent!=c,kind==active'),
    "labels": (lambda data, _: check_labels({utf8(data): utf8(data)}), b"containerd.io/snapshot.ref"),
    "presence-live": (live, encode_live(DEVICE, RECORD, BOOT)),
    "presence-checkpoint": (checkpoint, encode_checkpoint(DEVICE, RECORD)),
    "signatures": (lambda data, _: parse_signatures(data), SIGNATURES),
    "payload": (lambda data, _: parse_payload(data), build_payload(DEVICE.digest, "a.example/app")),
    "public-keys": (lambda data, _: load_public_keys(data, "key"), PUBLIC_KEY),
}


def json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def refused_or_taken(parse: Callable[[bytes, Path], object], data: bytes, directory: Path) -> None:
    with contextlib.suppress(LazyfsError):
        parse(data, directory)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    parse, seed = TARGETS[target]
    rng = random.Random(f"lazyfs inputs {target}")
    for _ in range(int(COUNT * request.config.getoption("--fuzz"))):
        refused_or_taken(parse, mutate(rng, seed), tmp_path)
