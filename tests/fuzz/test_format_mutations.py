"""Mutated format bytes: each parser gives a checked result or FormatError, nothing else, whatever the bytes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

from lazyfs.errors import FormatError
from lazyfs.image.artifact import PREFETCH_TYPE, add_referrer, build_artifact, parse_artifact, parse_referrers
from lazyfs.image.blob import FOOTER_BYTES, parse_footer, parse_tail
from lazyfs.image.bootstrap import compress_layer, decompress_layer, pack_bootstrap, parse_bootstrap
from lazyfs.image.config import build_config, parse_config, without_added
from lazyfs.image.descriptor import Document
from lazyfs.image.digest import Digest
from lazyfs.image.entries import pack_entries, parse_entries
from lazyfs.image.hot import pack_hot, parse_hot
from lazyfs.image.manifest import parse_lazy_manifest, parse_manifest
from lazyfs.image.model import Attributes, DataMap, EntryKind, FileType, LayerEntry
from lazyfs.image.oci import OCI_MANIFEST, is_index, parse_index
from lazyfs.image.prefetch import parse_prefetch
from lazyfs.image.signature import add_signature, build_payload, parse_payload, parse_signatures
from lazyfs.profile.recording import from_json, to_json
from tests.formatkit import CHUNK_SIZE, make_blob, make_bootstrap, make_hot
from tests.profilekit import recording
from tests.unit.test_manifest_lazy import build, config, manifest

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).parents[1] / "corpus" / "format"
ENTRIES = [
    LayerEntry(b"", type=FileType.DIRECTORY, attributes=Attributes(0o700, xattrs=((b"user.a", b"v"),))),
    LayerEntry(b"f", size=9000, data=DataMap(12, ((0, 1, 1), (2, 1, 0)))),
    LayerEntry(b"d/l", type=FileType.SYMLINK, target=b"f"), LayerEntry(b"c", type=FileType.CHARACTER, rdev=(1, 3)),
    LayerEntry(b"h", EntryKind.HARDLINK, target=b"f"), LayerEntry(b"w", EntryKind.WHITEOUT),
    LayerEntry(b"d", EntryKind.OPAQUE),
]
BLOB, _, TAIL = make_blob(bytes(range(256)) * 64, ENTRIES)
TAR = pack_bootstrap(make_bootstrap([bytes(range(256)) * 512, b"x" * 4096], hot=[(3, 0, 9), (0, 1, 1)]))
HOT, HOT_SIZE = make_hot([bytes(range(256)) * 512, b"x" * 4096], [(3, 0, 9), (0, 1, 1)], CHUNK_SIZE, hot_index=1)
INDEX = json.dumps({"schemaVersion": 2, "manifests": [
    {**manifest()["config"], "mediaType": manifest()["mediaType"], "platform": {"os": "linux", "architecture": "arm64"}}
]}).encode()

PREFETCH = (b'# lazyfs-prefetch 1\n# image: i@sha256:0\n# runs: 3\nusr/**/x?[a-z]* share=0.5\n'
            b'"odd \\xff\\n" 0-5,7- ms=1.5 share=0.25\n\n# c\n/a 0-\n')
RECORDING = to_json(recording([(0, 0, 4096, 0.0), (1, 8192, 8200, 12.5)], devices=2))
SUBJECT = Document(b"{}", OCI_MANIFEST, Digest.of(b"{}"))
NOW = "2026-01-31T12:00:00Z"
ARTIFACT = build_artifact(SUBJECT, PREFETCH, NOW)


def signatures(data: bytes) -> object:
    """What is added to goes through the same checks, and says what it held."""
    parse_signatures(data)
    return parse_signatures(add_signature(data, b"payload", b"value")[0].data)


def entries_raw(data: bytes) -> object:
    """Mutations inside the frame, where the fields are."""
    return parse_entries(zstandard.ZstdCompressor(level=1).compress(data), device_size=1 << 20)


def lazy(data: bytes) -> object:
    return parse_lazy_manifest(parse_manifest(data, ""))


def configs(data: bytes) -> object:
    parse_config(data, 2)
    without_added(data, [Digest.of(b"")], 1)
    return build_config(data, 2, [Digest.of(b"")] * 2, [])


def artifact(data: bytes) -> object:
    return parse_artifact(Document(data, OCI_MANIFEST, Digest.of(data)), SUBJECT.digest)


def referrers(data: bytes) -> object:
    add_referrer(data, ARTIFACT, NOW)
    return parse_referrers([data], PREFETCH_TYPE)


def index(data: bytes) -> object:
    return parse_index(data, "") if is_index("", data) else parse_manifest(data, "")


TARGETS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "entries": (parse_entries, pack_entries(ENTRIES)),
    "entries-raw": (entries_raw, zstandard.ZstdDecompressor().decompress(pack_entries(ENTRIES))),
    "footer": (lambda data: parse_footer(data, len(BLOB)), BLOB[-FOOTER_BYTES:]),
    "tail": (lambda data: parse_tail(data, len(BLOB)), TAIL),
    "bootstrap": (parse_bootstrap, TAR),
    "hot": (lambda data: parse_hot(data, [256 * 512, 4096], [9, HOT_SIZE], 1), pack_hot(HOT)),
    "bootstrap-layer": (lambda data: decompress_layer(data, len(TAR)), compress_layer(TAR)),
    "manifest": (lazy, json.dumps(build()[0]).encode()),
    "index": (index, INDEX),
    "config": (configs, config()),
    "prefetch": (parse_prefetch, PREFETCH),
    "artifact": (artifact, ARTIFACT.data),
    "referrers": (referrers, add_referrer(None, ARTIFACT, NOW).data),
    "recording": (from_json, RECORDING),
    "signatures": (signatures, add_signature(None, b"payload", b"value")[0].data),
    "payload": (parse_payload, build_payload(SUBJECT.digest, "registry.example/app")),
}
INTERESTING = [b"\0", b"\xff", b"-", b"9", b'"', b"{", b"[", b"null", b"-1", b"\\", b"/", b"../", b"\n",
b"\xdd\xff\xff\xff\xff",
               b"1e999", b"9" * 30, b"\xc3", b"\xed\xa0\x80", b"*", b" ", b"\x00" * 8, b"\xff" * 8]


def mutate(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(changed):
                changed[at] = rng.randrange(256)
            case 2:
                changed[at:at] = rng.choice(INTERESTING)
            case 3:
                piece = rng.choice(INTERESTING)
                changed[at : at + len(piece)] = piece
            case 4:
                del changed[at : at + rng.choice([1, 2, 8, 100])]
            case _:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.choice([1, 8, 64])]
    return bytes(changed)


def accepts_or_refuses(parse: Callable[[bytes], object], data: bytes) -> bool:
    try:
        parse(data)
    except FormatError:
        return False
    return True


@pytest.mark.parametrize("target", TARGETS)
def test_mutations(target: str, request: pytest.FixtureRequest) -> None:
    parse, seed = TARGETS[target]
    assert accepts_or_refuses(parse, seed)
    rng = random.Random(f"lazyfs {target}")
    count = int(6000 * request.config.getoption("--fuzz"))
    accepted = sum(accepts_or_refuses(parse, mutate(rng, seed)) for _ in range(count))
    assert accepted < count


@pytest.mark.parametrize("target", TARGETS)
def test_truncations(target: str) -> None:
    parse, seed = TARGETS[target]
    step = max(1, len(seed) // 400)
    for end in range(0, len(seed), step):
        accepts_or_refuses(parse, seed[:end])


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_kept_corpus(path: Path) -> None:
    """Inputs that once got through or raised something else; name: <target>.<what>."""
    parse, _ = TARGETS[path.name.partition(".")[0]]
    assert not accepts_or_refuses(parse, path.read_bytes())
