"""
EROFS superblock and device table: bytes and back, every field checked.

Layer: lazyfs.image, pure. The superblock is at byte 1024 (128 bytes), the device table right behind it (128 bytes a
device). The checksum is CRC-32C over bytes 1024..4095 with its own field zero, as kernel and fsck.erofs compute it.
Fields that lazyfs has no use for must be zero: a value there may mean something to a kernel, now or later.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.erofs.ondisk import BLOCK_BYTES, BLOCK_SHIFT, crc32c

if TYPE_CHECKING:
    from collections.abc import Sequence

MAGIC = 0xE0F5_E1E2
SUPER_OFFSET = 1024
DEVICE_TABLE_OFFSET = 1152     # the next multiple of a slot
DEVICE_SLOT_BYTES = 128
COMPAT = 0x1 | 0x2             # SB_CHKSUM, MTIME
INCOMPAT = 0x4 | 0x8           # CHUNKED_FILE, DEVICE_TABLE
_CHECKSUM_OFFSET = SUPER_OFFSET + 4
_UUID_OFFSET = SUPER_OFFSET + 48

# magic, checksum, compat, block shift, extra slots, root nid | inodes, build time, its ns, blocks, metadata block,
# shared xattr block | uuid, volume name | incompat, compression, devices, device table slot, directory block shift,
# xattr prefixes, their start, packed nid | rest
_SUPER = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQ24s")
_SLOT = struct.Struct("<64sII56s")
assert _SUPER.size == 128
assert _SLOT.size == DEVICE_SLOT_BYTES
_NO_BYTES = bytes(64)


@dataclass(frozen=True, slots=True)
class Superblock:
    """What of it varies from image to image."""

    root_nid: int
    inode_count: int
    block_count: int
    device_count: int


def metadata_start(device_count: int) -> int:
    """First byte behind the device table."""
    return DEVICE_TABLE_OFFSET + DEVICE_SLOT_BYTES * device_count


def check_device_sizes(device_sizes: Sequence[int]) -> None:
    """Raises FormatError unless every size (bytes) is a multiple of 4096 that EROFS can address."""
    if len(device_sizes) > limits.DEVICE_COUNT_MAX:
        raise FormatError(f"{len(device_sizes)} layer devices, at most {limits.DEVICE_COUNT_MAX} are supported")
    for index, size in enumerate(device_sizes):
        if not 0 <= size <= limits.DEVICE_BYTES_MAX or size % BLOCK_BYTES:
            raise FormatError(f"layer device {index} of {size} bytes: expected a multiple of {BLOCK_BYTES} in limits")


def write_superblock(image: bytearray, fields: Superblock, device_sizes: Sequence[int]) -> None:
    """Fill in superblock and device table; `seal` must follow when all other bytes are there."""
    _SUPER.pack_into(
        image, SUPER_OFFSET, MAGIC, 0, COMPAT, BLOCK_SHIFT, 0, fields.root_nid, fields.inode_count, 0, 0,
        fields.block_count, 0, 0, bytes(16), bytes(16), INCOMPAT, 0, fields.device_count,
        DEVICE_TABLE_OFFSET // DEVICE_SLOT_BYTES, 0, 0, 0, 0, bytes(24),
    )  # fmt: skip
    for index, size in enumerate(device_sizes):
        offset = DEVICE_TABLE_OFFSET + index * DEVICE_SLOT_BYTES
        _SLOT.pack_into(image, offset, bytes(64), size // BLOCK_BYTES, 0, bytes(56))


def seal(image: bytearray, digest: bytes) -> None:
    """Write the uuid, made of a digest of all other bytes (RFC 9562 version 8), and then the checksum."""
    uuid = bytearray(digest[:16])
    uuid[6] = uuid[6] & 0x0F | 0x80
    uuid[8] = uuid[8] & 0x3F | 0x80
    image[_UUID_OFFSET : _UUID_OFFSET + 16] = uuid
    image[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 4] = bytes(4)
    checksum = crc32c(image[SUPER_OFFSET:BLOCK_BYTES])
    image[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 4] = checksum.to_bytes(4, "little")


def parse_superblock(data: memoryview, device_sizes: Sequence[int]) -> Superblock:
    """
    Validate superblock and device table against the image's size and the devices it will be mounted with.

    Raises:
        FormatError: not EROFS, damaged, or of other devices.
        UnsupportedError: EROFS of a kind that lazyfs does not write.

    """
    check_device_sizes(device_sizes)
    if len(data) < BLOCK_BYTES or len(data) % BLOCK_BYTES or len(data) > limits.BOOTSTRAP_BYTES_MAX:
        raise FormatError(f"EROFS image of {len(data)} bytes: expected a multiple of {BLOCK_BYTES} within limits")
    (magic, checksum, compat, block_shift, extra_slots, root_nid, inodes, built_s, built_ns, blocks, meta, shared,
     _uuid, label, incompat, compression, devices, slot, dir_shift, prefixes, prefix_start, packed, rest,
    ) = _SUPER.unpack_from(data, SUPER_OFFSET)  # fmt: skip
    if magic != MAGIC:
        raise FormatError(f"no EROFS superblock: magic {magic:#010x}, expected {MAGIC:#010x}")
    if block_shift != BLOCK_SHIFT:
        raise UnsupportedError(f"EROFS block shift {block_shift}: expected {BLOCK_SHIFT}")
    if compat != COMPAT or incompat != INCOMPAT:
        raise UnsupportedError(f"EROFS features {compat:#x}, {incompat:#x}: expected {COMPAT:#x}, {INCOMPAT:#x}")
    block = bytearray(data[SUPER_OFFSET:BLOCK_BYTES])
    block[4:8] = bytes(4)
    if crc32c(block) != checksum:
        raise FormatError("EROFS superblock checksum does not fit: the image is damaged")
    used = (extra_slots, built_s, built_ns, meta, shared, compression, dir_shift, prefixes, prefix_start, packed)
    if any(used) or any(label) or any(rest):
        raise UnsupportedError("EROFS superblock uses fields that lazyfs does not know")
    if blocks * BLOCK_BYTES != len(data):
        raise FormatError(f"EROFS image states {blocks} blocks, but holds {len(data)} bytes")
    if not 1 <= inodes <= limits.ENTRY_COUNT_MAX:
        raise FormatError(f"EROFS image states {inodes} inodes, expected 1 to {limits.ENTRY_COUNT_MAX}")
    if slot * DEVICE_SLOT_BYTES != DEVICE_TABLE_OFFSET:
        raise UnsupportedError(f"EROFS device table at slot {slot}: expected right behind the superblock")
    _check_devices(data, devices, device_sizes)
    return Superblock(root_nid, inodes, blocks, devices)


def _check_devices(data: memoryview, count: int, device_sizes: Sequence[int]) -> None:
    if count != len(device_sizes):
        raise FormatError(f"EROFS image names {count} devices, expected {len(device_sizes)}")
    if metadata_start(count) > len(data):
        raise FormatError("EROFS device table reaches beyond the image")
    for index, size in enumerate(device_sizes):
        tag, blocks, mapped, rest = _SLOT.unpack_from(data, DEVICE_TABLE_OFFSET + index * DEVICE_SLOT_BYTES)
        if blocks * BLOCK_BYTES != size:
            raise FormatError(f"EROFS device {index} has {blocks} blocks, expected {size // BLOCK_BYTES}")
        # A tag would be taken as a path to open by a kernel that was given no device.
        if mapped or any(tag) or any(rest):
            raise UnsupportedError(f"EROFS device {index} uses fields that lazyfs does not know")
