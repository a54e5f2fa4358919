"""
Every bound and size constant, with its unit in its name, its origin and its relations.

Bytes from outside are refused above these; buffers never grow beyond them.
"""

from __future__ import annotations

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# --- format -------------------------------------------------------------------------------------------------------
BLOCK_SIZE_BYTES = 4096          # EROFS block; the page size of every machine we run on
CHUNK_SIZE_MIN_BYTES = 64 * KIB
CHUNK_SIZE_MAX_BYTES = 1 * MIB   # the largest FUSE request is 1 MiB
CHUNK_SIZE_DEFAULT_BYTES = 1 * MIB    # by measurement, docs/design.md
DEVICE_BYTES_MAX = 16 * TIB - BLOCK_SIZE_BYTES   # EROFS: 32-bit block address; all ones means a hole
DEVICE_COUNT_MAX = 512           # layers of one image; containerd and Docker stop at 127
CHUNK_COUNT_MAX = 1 << 26        # rows in all tables of an image: 16 TiB at 256 KiB
BLOB_COUNT_MAX = 1024            # blobs one image's tables may name
HOT_BYTES_MAX = 8 * GIB          # hot device: at most 2 million extents, 16 MiB of table and some 100 MiB to sort them

# --- metadata -----------------------------------------------------------------------------------------------------
ENTRY_COUNT_MAX = 20_000_000     # entries of one layer, or of one merged image
NAME_BYTES_MAX = 255             # NAME_MAX
PATH_BYTES_MAX = 4096            # PATH_MAX
PATH_DEPTH_MAX = 2048            # components; PATH_MAX / 2
SYMLINK_BYTES_MAX = 4095         # PATH_MAX - 1
SYMLINK_HOPS_MAX = 40            # as Linux
LINK_COUNT_MAX = 0xFFFF_FFFF
XATTR_NAME_BYTES_MAX = 255       # XATTR_NAME_MAX
XATTR_VALUE_BYTES_MAX = 65_535   # EROFS stores 16 bits; Linux allows 65,536
XATTR_INODE_BYTES_MAX = 4 * 65_534 + 12  # EROFS: 16-bit count of 4-byte units, after a 12-byte header
FILE_BYTES_MAX = (1 << 63) - 1   # loff_t
TAR_HEADER_BYTES_MAX = 1 * MIB   # one PAX header or GNU long name; a xattr may hold 64 KiB, base64 is not used
SPARSE_SEGMENT_COUNT_MAX = 1_000_000

# --- OCI ----------------------------------------------------------------------------------------------------------
MANIFEST_BYTES_MAX = 4 * MIB     # the limit registries apply (distribution-spec: at least 4 MiB accepted)
CONFIG_BYTES_MAX = 8 * MIB
INDEX_MANIFEST_COUNT_MAX = 256
BOOTSTRAP_BYTES_MAX = 4 * GIB    # uncompressed bootstrap layer (20 million entries)
LAYER_BYTES_MAX = 16 * TIB       # uncompressed tar

# --- network ------------------------------------------------------------------------------------------------------
CONNECT_TIMEOUT_S = 10.0
IO_TIMEOUT_S = 30.0              # no byte for this long: the connection is dead
READ_DEADLINE_S = 60.0           # one FUSE read, all retries included
REQUEST_DEADLINE_S = 120.0       # one small request (manifest, token) of the command line
REDIRECT_COUNT_MAX = 5
RETRY_COUNT_MAX = 6
RETRY_FIRST_S = 0.1              # doubles, times uniform(0.5, 1.5)
RETRY_PAUSE_MAX_S = 10.0
TOKEN_BYTES_MAX = 64 * KIB
RANGE_REQUEST_BYTES_MAX = 32 * MIB   # a window of prefetch; nobody holds it in memory

assert CHUNK_SIZE_MIN_BYTES % BLOCK_SIZE_BYTES == 0
assert CHUNK_SIZE_MIN_BYTES <= CHUNK_SIZE_DEFAULT_BYTES <= CHUNK_SIZE_MAX_BYTES
