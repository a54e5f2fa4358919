"""
Inode numbers that say everything: which image, which file in it. No table, so a worker that takes a live mount over
(or restarts) understands every number and every file handle the kernel still holds: a handle *is* an inode number.

    bits 63..36  slot   0: the fixed directories and the device files; else an image, in order of mounting
    bits 35..0   nid    slot 0: see below; else the EROFS node number within that image

Slots and device indexes are never given twice in a worker's life: the kernel may hold a number for long.
Pure arithmetic; who calls: fs.operations.
"""

from __future__ import annotations

from lazyfs.errors import FormatError

NID_BITS = 36                    # a bootstrap of 4 GiB has 2^27 nodes; EROFS could count to 2^43
NID_MASK = (1 << NID_BITS) - 1
SLOT_MAX = (1 << 27) - 1         # st_ino stays positive in signed 64 bits

ROOT_INODE = 1                   # FUSE_ROOT_ID
DEVICES_INODE = 2                # dev/
TREES_INODE = 3                  # tree/
FIRST_DEVICE_INODE = 16
FIRST_TREE_INODE = 1 << NID_BITS


def device_inode(index: int) -> int:
    """The inode of device file `index`."""
    assert 0 <= index <= NID_MASK - FIRST_DEVICE_INODE
    return FIRST_DEVICE_INODE + index


def tree_inode(slot: int, nid: int) -> int:
    """The inode of node `nid` of the image in `slot`. Raises FormatError: a node number beyond any real image."""
    assert 1 <= slot <= SLOT_MAX
    if not 0 <= nid <= NID_MASK:
        raise FormatError(f"EROFS node number {nid} is beyond {NID_MASK}")
    return slot << NID_BITS | nid


def split(inode: int) -> tuple[int, int]:
    """(slot, nid or number within slot 0)."""
    return inode >> NID_BITS, inode & NID_MASK
