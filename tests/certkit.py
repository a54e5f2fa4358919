"""
Certificates of a cluster's nodes, as files.

    authority = trustme.CA()
    node = issue(tmp_path / "1", authority, "node-1", "127.0.0.1")     # lazyfs.peers.tlsfiles.TlsFiles
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lazyfs.peers.tlsfiles import TlsFiles

if TYPE_CHECKING:
    from pathlib import Path

    import trustme


def issue(directory: Path, authority: trustme.CA, *names: str, believes: trustme.CA | None = None) -> TlsFiles:
    """A node's three files: cert.pem, key.pem, ca.pem. Again: new ones in their place, each at once."""
    directory.mkdir(exist_ok=True)
    leaf = authority.issue_cert(*names)
    for name, blobs in (("cert", leaf.cert_chain_pems), ("key", [leaf.private_key_pem]),
                        ("ca", [(believes or authority).cert_pem])):
        path = directory / f"{name}.new"
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        path.chmod(0o600)
        path.replace(directory / f"{name}.pem")
    return TlsFiles("peers", *(str(directory / f"{name}.pem") for name in ("cert", "key", "ca")))
