"""Keys of signatures, made by openssl: `private, public = make_key(tmp_path, "ed25519")`."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

OPENSSL = shutil.which("openssl")
KINDS = {
    "p256": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "p384": ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"],
    "rsa": ["-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"],
    "ed25519": ["-algorithm", "ED25519"],
}


def openssl(*words: str | Path) -> None:
    """Run it; skips the test where it is not installed."""
    if OPENSSL is None:
        pytest.skip("openssl is not installed")
    subprocess.run([OPENSSL, *map(str, words)], check=True, capture_output=True)


def make_key(directory: Path, kind: str) -> tuple[Path, Path]:
    """Private and public, of one of KINDS."""
    private, public = directory / f"{kind}.key", directory / f"{kind}.pub"
    openssl("genpkey", *KINDS[kind], "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    return private, public
