"""
Mutated and bomb-like layers: an image or FormatError, in bounded memory and time.

The kept corpus (tests/corpus/tar) holds small archives of every form, plain and compressed; `python -m
tests.fuzz.test_tar_mutations corpus` writes it anew, `... run SEED COUNT` mutates it. The tests do the latter in a
process of its own with limits on its address space and CPU time. A case that ever fails belongs into the corpus.
"""

from __future__ import annotations

import gzip
import io
import os
import random
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

from converter.layerstream import LayerStream
from converter.tar import TarReader
from lazyfs.errors import FormatError
from lazyfs.image.digest import Digest
from lazyfs.limits import MIB
from tests.tarbuilder import BLOCK, TarBuilder, base256, checksum, header

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).parent.parent / "corpus" / "tar"
ADDRESS_SPACE_BYTES = 512 * MIB     # the interpreter and its libraries take about 150 MiB of it
CPU_S = 60


class Blob(io.BytesIO):
    """A ByteStream over bytes."""


def read_layer(blob: bytes) -> int:
    """Read a layer to its end as the converter does; the number of entries."""
    count = 0
    with LayerStream(Blob(blob), "", size=len(blob), digest=Digest.of(blob), name="layer") as layer:
        reader = TarReader(layer, name="layer")
        for member in reader:
            count += 1
            assert b"\0" not in member.entry.path
            assert not {b"", b".", b".."} & set(member.entry.path.split(b"/")) or not member.entry.path
            left = sum(length for _, length in member.segments)
            while left:
                left -= len(reader.read_data(1 << 18))
        layer.finish()
    return count


# --- corpus -------------------------------------------------------------------------------------------------------
def seeds() -> dict[str, bytes]:
    segments = [(i * 10_000, b"s" * (i + 1)) for i in range(30)]
    pax = (
        TarBuilder().directory("./").directory("d").file("d/f", b"data" * 200, mtime=(-3, 5), xattrs={"user.x": b"\0="})
        .symlink("s", "t" * 200).hardlink("h", "d/f").device("n", "c", 1, 3).fifo("p").whiteout("d/w").opaque("d")
        .file("l" * 200, uid=2**32 - 1, pax={"LIBARCHIVE.xattr.user.y": "YWJj", "comment": "x"})
        .global_pax({"comment": "c"})
    )
    gnu = (
        TarBuilder("gnu").file("g" * 250, b"1").symlink("k", "x" * 300).file("big", uid=2**31, mtime=-5)
        .sparse_gnu("s", 1 << 40, segments)
    )
    old = TarBuilder().raw(header("v7/", type="\0", magic=b"") + header("v7f", type="\0", magic=b"") + header(
        "name", prefix="some/prefix") + header("c", type="7") + header("neg", mtime=base256(-9, 12)))
    found = {"pax.tar": pax.build(), "gnu.tar": gnu.build(), "old.tar": old.build(), "empty.tar": bytes(1024)}
    for version in ("0.0", "0.1", "1.0"):
        found[f"sparse-{version}.tar"] = TarBuilder().sparse_pax(version, "s", 1 << 40, segments).build()
    small = found["pax.tar"]
    found["members.tar.gz"] = b"".join(gzip.compress(small[i : i + 3000], mtime=0) for i in range(0, len(small), 3000))
    found["frames.tar.zst"] = b"\x50\x2a\x4d\x18\x03\0\0\0abc" + b"".join(
        zstandard.ZstdCompressor(write_checksum=True).compress(small[i : i + 5000]) for i in range(0, len(small), 5000))
    return found


def refused() -> dict[str, bytes]:
    """Small cases that were dangerous to other readers."""
    sparse = {"GNU.sparse.size": "9", "GNU.sparse.map": "0,-5,4,9"}
    return {
        "refused-parent.tar": TarBuilder().pax({"path": "a/../../etc/passwd"}).member("x").build(),
        "refused-nul.tar": TarBuilder().pax({"path": b"a\0b"}).member("x").build(),
        "refused-size.tar": header("x", size=base256(-512, 12)),
        "refused-pax-size.tar": TarBuilder().pax({"size": "-1"}).member("x").build(),
        "refused-pax-length.tar": TarBuilder().pax(b"99999999999999999999 path=x\n").member("x").build(),
        "refused-time.tar": TarBuilder().pax({"mtime": "nan"}).member("x").build(),
        "refused-sparse.tar": TarBuilder().pax(sparse).member("x", b"12345").build(),
        "refused-global.tar": TarBuilder().global_pax({"path": "etc/shadow"}).file("x").build(),
        "refused-whiteout.tar": TarBuilder().file("d/.wh...").build(),
        "refused-directory-data.tar": TarBuilder().member("d/", header("smuggled"), type="5").build(),
        "refused-window.tar.zst": b"\x28\xb5\x2f\xfd\x00\xa8\1\0\0",
    }


# --- mutation -----------------------------------------------------------------------------------------------------
NUMBERS = [b"-1", b"9" * 12, b"7" * 12, b"\x80" + bytes(11), b"\xff" * 12, b"\x80\x7f" + b"\xff" * 10, bytes(12),
           b" " * 12, b"00000001000\0", b"0000000000x\0"]
WORDS = [b"..", b"/", b"\0", b"=", b"\n", b"-", b"9999999999", b".wh.", b".wh..wh..opq", b"GNU.sparse.", b"path=",
         b"nan"]
FIELDS = [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8), (483, 12)]
TYPES = [b"0", b"1", b"2", b"5", b"x", b"g", b"L", b"K", b"S", b"\0"]


def mutate(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        at = chance.randrange(len(out) or 1)
        block = at // BLOCK * BLOCK
        match chance.randrange(9):
            case 0:
                out[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                del out[at:]
            case 2:
                del out[at : at + chance.choice([1, 8, BLOCK])]
            case 3:
                out[at:at] = chance.choice(WORDS)
            case 4:
                word = chance.choice(WORDS)
                out[at : at + len(word)] = word
            case 5:
                out[block:block] = out[block : block + BLOCK * chance.choice([1, 2, 3])]
            case 6:
                offset, width = chance.choice(FIELDS)
                out[block + offset : block + offset + width] = chance.choice(NUMBERS)[:width]
            case 7:
                out[block + 156 : block + 157] = chance.choice(TYPES)
            case _:
                out[block + 257 : block + 265] = chance.choice([b"ustar\x0000", b"ustar  \0", bytes(8)])
        if chance.random() < 0.9 and len(out) >= block + BLOCK:
            out[block + 148 : block + 156] = b"%06o\0 " % checksum(bytes(out[block : block + BLOCK]))
    return bytes(out)


def run(seed: int, count: int) -> None:
    """Mutate the corpus `count` times; anything but an image or FormatError ends the process with a traceback."""
    chance = random.Random(seed)
    corpus = [path.read_bytes() for path in sorted(CORPUS.iterdir())]
    fine = 0
    for index in range(count):
        data = mutate(chance.choice(corpus), chance)
        try:
            read_layer(data)
            fine += 1
        except FormatError:
            pass
        except BaseException:
            Path("/tmp/tar-fuzz-failure").write_bytes(data)
            print(f"seed {seed}, case {index}: kept as /tmp/tar-fuzz-failure", file=sys.stderr)
            raise
    print(f"{fine} of {count} were taken")


# --- bombs --------------------------------------------------------------------------------------------------------
def zstd_zeros(size: int, window_log: int = 17) -> bytes:
    """A frame of RLE blocks: 4 bytes for 128 KiB each."""
    blocks = [struct.pack("<I", (131_072 << 3) | 2)[:3] + b"\0"] * (size // 131_072) + [b"\1\0\0"]
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + b"".join(blocks)


BIG_BYTES = 2 * ADDRESS_SPACE_BYTES
BIG_HEADER = header("zeros", size=BIG_BYTES)
END = bytes(2 * BLOCK)


def many_segments() -> bytes:
    lines = b"1000000\n" + b"".join(b"%d\n1\n" % (2 * i) for i in range(1_000_000))
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2000000"}
    return TarBuilder().pax(pax).member("x", lines + bytes(-len(lines) % BLOCK) + b"x" * 1_000_000).build()


# Each with the number of entries, or None: to be refused.
BOMBS: dict[str, tuple[Callable[[], bytes], int | None]] = {
    "gzip": (lambda: gzip.compress(BIG_HEADER) + gzip.compress(bytes(16 * MIB)) * (BIG_BYTES // (16 * MIB)), 1),
    "zstd": (lambda: zstandard.compress(BIG_HEADER) + zstd_zeros(BIG_BYTES), 1),
    "zstd, large window": (lambda: zstandard.compress(BIG_HEADER) + zstd_zeros(BIG_BYTES, 27), 1),
    "zstd, zeros after the end": (lambda: zstandard.compress(END) + zstd_zeros(BIG_BYTES), 0),
    "zstd, skippable frames": (lambda: zstandard.compress(END) + b"\x50\x2a\x4d\x18\0\0\0\0" * 300_000, 0),
    "zstd, skippable 4 GiB": (lambda: zstandard.compress(END) + b"\x50\x2a\x4d\x18\xff\xff\xff\xff", None),
    "zstd, says 1 TiB": (lambda: b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 40) + b"\1\0\0", None),
    "gzip, members": (lambda: gzip.compress(b"") * 50_000, 0),
    "segments": (many_segments, 1),
    "big headers": (lambda: (TarBuilder().pax({"comment": "x" * (MIB - 50)}).member("a").build(end=False)) * 50, 50),
    "headers without entry": (lambda: TarBuilder().pax({"comment": "x" * 100}).build(end=False) * 100_000, None),
    "global headers": (lambda: TarBuilder().global_pax({"comment": "x" * 100}).build(end=False) * 50_000, 0),
}


def run_bomb(name: str) -> None:
    build, expected = BOMBS[name]
    try:
        count: int | None = read_layer(build())
    except FormatError as error:
        print(error)
        count = None
    assert count == expected, (count, expected)


def limited(*arguments: str) -> str:
    """Run this module in a process whose memory and time are limited."""
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))

    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.test_tar_mutations", *arguments], cwd=CORPUS.parent.parent.parent,
        preexec_fn=limit, env={**os.environ, "MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_corpus_is_read() -> None:
    counts = {"empty.tar": 0, "gnu.tar": 4, "old.tar": 5, "pax.tar": 10, "members.tar.gz": 10, "frames.tar.zst": 10}
    names = {path.name for path in CORPUS.iterdir()}
    assert names >= counts.keys() | refused().keys()
    for name in names:
        data = (CORPUS / name).read_bytes()
        if name.startswith("refused"):
            with pytest.raises(FormatError):
                read_layer(data)
        else:
            assert read_layer(data) == counts.get(name, 1)


@pytest.mark.parametrize("seed", range(3))
def test_mutations(seed: int, request: pytest.FixtureRequest) -> None:
    count = int(2000 * request.config.getoption("--fuzz"))
    taken = int(limited("run", str(seed), str(count)).split()[0])
    assert 0.05 * count < taken < 0.95 * count      # both outcomes are met


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    limited("bomb", name)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["corpus"]:
            CORPUS.mkdir(parents=True, exist_ok=True)
            for seed_name, seed_data in (seeds() | refused()).items():
                (CORPUS / seed_name).write_bytes(seed_data)
        case ["run", seed_text, count_text]:
            run(int(seed_text), int(count_text))
        case ["bomb", bomb_name]:
            run_bomb(bomb_name)
