"""Trees of the model for EROFS tests: random ones, canonical snapshots to compare, and damage done on purpose."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from lazyfs.image.erofs import write_image
from lazyfs.image.erofs.ondisk import crc32c
from lazyfs.image.model import Attributes, DataMap, FileType, Inode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DEVICE_SIZES = (1 << 20, 4096, 256 << 10)
CORPUS = Path(__file__).parent / "corpus" / "erofs"
_ALPHABET = b"ab.-!\xff\x01"
# Version 2; user::rw-, user:1000:r--, group::r--, mask::r--, other::r--
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry) for entry in [(1, 6, -1 & 0xFFFFFFFF), (2, 4, 1000), (4, 4, -1 & 0xFFFFFFFF),
                                              (16, 4, -1 & 0xFFFFFFFF), (32, 4, -1 & 0xFFFFFFFF)]
)  # fmt: skip
CAPABILITY = struct.pack("<IIIII", 0x0200_0001, 1 << 10, 0, 0, 0)   # cap_net_bind_service=ep


def directory(**children: Inode) -> Inode:
    node = Inode(FileType.DIRECTORY, Attributes(), children={name.encode(): child for name, child in children.items()})
    node.link_count = 2 + sum(child.type is FileType.DIRECTORY for child in children.values())
    return node


def regular(size: int = 0, device: int = 0, block: int = 0, **attributes: object) -> Inode:
    """A file in one piece."""
    shift = max((size - 1).bit_length(), 12)
    runs = ((0, 1, block),) if size else ()
    return Inode(
        FileType.REGULAR, Attributes(mode=0o644, **attributes), size=size, device=device, data=DataMap(shift, runs)
    )


def symlink(target: bytes, **attributes: object) -> Inode:
    return Inode(FileType.SYMLINK, Attributes(mode=0o777, **attributes), target=target)


def random_tree(rng: random.Random, entries: int = 30, device_sizes: Sequence[int] = DEVICE_SIZES) -> Inode:
    """A tree of about `entries` names: small alphabet, all types, hard links, xattrs, sparse maps, odd sizes."""
    root = Inode(FileType.DIRECTORY, _attributes(rng, FileType.DIRECTORY))
    directories, others = [root], []
    for _ in range(rng.randint(0, entries)):
        parent = rng.choice(directories)
        name = _name(rng)
        if name in parent.children or name in {b".", b".."}:
            continue
        if others and rng.random() < 0.15:
            child = rng.choice(others)
            child.link_count += 1
        else:
            child = _node(rng, device_sizes)
            (directories if child.type is FileType.DIRECTORY else others).append(child)
        parent.children[name] = child
    for node in directories:
        node.link_count = 2 + sum(child.type is FileType.DIRECTORY for child in node.children.values())
    return root


def _name(rng: random.Random) -> bytes:
    size = 255 if rng.random() < 0.05 else rng.randint(1, 3)
    return bytes(rng.choice(_ALPHABET) for _ in range(size))


def _node(rng: random.Random, device_sizes: Sequence[int]) -> Inode:
    kind = rng.choice([FileType.DIRECTORY] * 3 + [FileType.REGULAR] * 6 + list(FileType))
    node = Inode(kind, _attributes(rng, kind))
    if kind is FileType.REGULAR:
        node.device = rng.randrange(len(device_sizes))
        node.size, node.data = _data(rng, device_sizes[node.device])
    elif kind is FileType.SYMLINK:
        node.target = bytes(rng.randint(1, 255) for _ in range(rng.choice([1, 7, 60, 3000, 4000, 4095])))
    elif kind in {FileType.CHARACTER, FileType.BLOCK}:
        node.rdev = (rng.randint(1, 4095), rng.choice([0, 1, 255, 256, 65535, (1 << 20) - 1]))
    return node


def _data(rng: random.Random, device_size: int) -> tuple[int, DataMap]:
    if rng.random() < 0.2:
        return rng.choice([0, 0, 1, 4097, 1 << 40, (1 << 63) - 1]), DataMap(12, ())
    shift = rng.choice([12, 12, 13, 16, 20])
    units = rng.randint(1, 12 if shift < 20 else 2)
    size = (units << shift) - rng.choice([0, 1, 4095, rng.randrange(1 << shift)])
    runs: list[tuple[int, int, int]] = []
    unit = 0
    while unit < units:
        count = rng.randint(1, units - unit)
        length = min((unit + count) << shift, -(-size // 4096) * 4096) - (unit << shift)
        if rng.random() < 0.7 and length <= device_size:
            runs.append((unit, count, rng.randint(0, (device_size - length) // 4096)))
        unit += count
    return size, DataMap(shift, tuple(runs))


def _attributes(rng: random.Random, kind: FileType) -> Attributes:
    return Attributes(
        rng.randint(0, 0o7777),
        rng.choice([0, 1000, 65536, 2**32 - 2]),
        rng.choice([0, 5, 70000, 2**32 - 2]),
        rng.choice([0, 1, -1, -(2**40), 2**33, 1_700_000_000]),
        rng.choice([0, 1, 999_999_999]),
        _xattrs(rng, kind),
    )


def _xattrs(rng: random.Random, kind: FileType) -> tuple[tuple[bytes, bytes], ...]:
    if rng.random() < 0.6:
        return ()
    names = {b"trusted.t": rng.randbytes(rng.choice([0, 1, 300, 5000]))}
    names[b"security.s" + b"x" * rng.randint(0, 240)] = b"v"
    if kind in {FileType.REGULAR, FileType.DIRECTORY}:      # Linux has user.* and ACLs on these only
        names[b"user." + b"u" * rng.randint(1, 250)] = rng.randbytes(rng.randint(0, 20))
        if rng.random() < 0.3:
            names[b"system.posix_acl_access"] = ACL
    if kind is FileType.REGULAR and rng.random() < 0.3:
        names[b"security.capability"] = CAPABILITY
    if kind is FileType.DIRECTORY and rng.random() < 0.3:
        names[b"system.posix_acl_default"] = ACL
    return tuple(sorted((name, value) for name, value in names.items() if rng.random() < 0.7))


def paths(root: Inode) -> Iterator[tuple[bytes, Inode]]:
    stack = [(b"", root)]
    while stack:
        path, node = stack.pop()
        yield path, node
        prefix = path + b"/" if path else b""
        stack += [(prefix + name, child) for name, child in node.children.items()]


def extents(node: Inode) -> list[tuple[int, int, int, int]]:
    """(device, file offset, device offset, length) of the data, as long as can be; whatever the units."""
    found: list[list[int]] = []
    shift = node.data.unit_shift
    for first, count, block in node.data.runs:
        start, end = first << shift, min((first + count) << shift, node.size)
        if found and found[-1][0] + found[-1][2] == start and found[-1][1] + found[-1][2] == block * 4096:
            found[-1][2] += end - start
        else:
            found.append([start, block * 4096, end - start])
    return [(node.device, *piece) for piece in found]


def snapshot(root: Inode) -> dict[bytes, tuple[object, ...]]:
    """Everything that can be compared, by path; hard links by the group's first path."""
    groups: dict[int, bytes] = {}
    for path, node in paths(root):
        groups[id(node)] = min(groups.get(id(node), path), path)
    return {
        path: (node.type, node.attributes, node.size, node.target, node.rdev, node.link_count, extents(node),
               groups[id(node)])
        for path, node in paths(root)
    }  # fmt: skip


def content(node: Inode, devices: Sequence[bytes], offset: int, size: int) -> bytes:
    """What reading a regular file must give."""
    end = min(offset + size, node.size)
    data = bytearray(max(end - offset, 0))
    for device, start, place, length in extents(node):
        low, high = max(start, offset), min(start + length, end)
        if low < high:
            data[low - offset : high - offset] = devices[device][place + low - start : place + high - start]
    return bytes(data)


def write_devices(folder: Path, sizes: Sequence[int] = DEVICE_SIZES) -> tuple[list[Path], list[bytes]]:
    """One file a layer device, of bytes that tell places apart."""
    rng = random.Random(7)
    contents = [rng.randbytes(size) for size in sizes]
    files = []
    for index, data in enumerate(contents):
        files.append(folder / f"device{index}")
        files[-1].write_bytes(data)
    return files, contents


def corpus_trees() -> dict[str, Inode]:
    """The trees of tests/corpus/erofs, all with DEVICE_SIZES. To write them anew: python -m tests.erofskit"""
    mixed = {f"mixed{seed}": random_tree(random.Random(seed), 25) for seed in (1, 2, 3)}
    pieces = DataMap(12, ((1, 3, 5), (9, 2, 50), (20, 1, 0)))
    sparse = Inode(FileType.REGULAR, Attributes(), size=40 * 4096, data=pieces)
    shared = regular(77, device=2)
    return mixed | {
        "empty": directory(),
        "blocks": directory(big=directory(**{f"name{index:04}": regular() for index in range(400)}), a=directory()),
        "data": directory(sparse=sparse, one=regular(4096, device=1), link=shared, link2=shared,
                          hole=Inode(FileType.REGULAR, Attributes(), size=1 << 40)),
        "links": directory(short=symlink(b"a"), long=symlink(b"x" * 4095), sub=directory(up=symlink(b"../short"))),
        "xattrs": directory(f=regular(1, xattrs=((b"security.capability", CAPABILITY), (b"user.k", b"v" * 200))),
                            d=Inode(FileType.DIRECTORY, Attributes(xattrs=((b"system.posix_acl_default", ACL),)))),
    }  # fmt: skip


def resealed(image: bytes | bytearray) -> bytes:
    """The image with a checksum that fits again: an attacker can do that too."""
    data = bytearray(image)
    data[1028:1032] = bytes(4)
    data[1028:1032] = crc32c(data[1024:4096]).to_bytes(4, "little")
    return bytes(data)


def mutated(rng: random.Random, image: bytes) -> bytes:
    """A few small changes, mostly where numbers are; nearly always with a checksum that fits."""
    data = bytearray(image)
    used = max(len(image.rstrip(b"\0")), 1200)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        offset = rng.randrange(1024, used) if rng.random() < 0.9 else rng.randrange(len(data) - 8)
        kind = rng.randrange(5)
        if kind == 0:
            data[offset] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[offset] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 2:
            fmt, bits = rng.choice([("<H", 16), ("<I", 32), ("<Q", 64)])
            value = rng.choice([0, 1, 2, rng.getrandbits(7), rng.getrandbits(bits), 1 << (bits - 1), (1 << bits) - 1])
            struct.pack_into(fmt, data, min(offset & ~1, len(data) - 8), value)
        elif kind == 3:     # one record over another
            size = rng.choice([8, 12, 32, 64, 96])
            source = rng.randrange(1024, used) & ~3
            data[offset & ~3 : (offset & ~3) + size] = data[source : source + size]
            del data[len(image) :]
            data += bytes(len(image) - len(data))
        else:
            cut = rng.randrange(1, 64)
            data[offset : offset + cut] = bytes(len(data[offset : offset + cut]))
    if rng.random() < 0.02:
        del data[rng.randrange(len(data)) :]
    return resealed(data) if len(data) >= 4096 and rng.random() < 0.98 else bytes(data)


def patched(image: bytes, offset: int, fmt: str, *values: object) -> bytes:
    data = bytearray(image)
    struct.pack_into("<" + fmt, data, offset, *values)
    return resealed(data)


if __name__ == "__main__":
    for name, tree in corpus_trees().items():
        (CORPUS / f"{name}.img").write_bytes(write_image(tree, DEVICE_SIZES))
