"""What is in the images."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from json import dumps

# The wheels' version is fixed so that figures of different days are of one image; its dependencies float.
TENSORFLOW = "tensorflow-cpu==2.20.0"

_BUILDER = 2  # raised when build.py makes other images of the same recipes
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class Step:
    """One layer above the base: a bash script with $ROOT (the overlay of all layers so far), `install` and $PIP."""

    comment: str
    script: str
    timeout_s: float = 900.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """An image: Debian's minimal root file system, then one layer a step."""

    name: str
    steps: tuple[Step, ...]
    command: tuple[str, ...]
    env: tuple[str, ...] = (_PATH, "LANG=C.UTF-8")

    @property
    def key(self) -> str:
        """Changes whenever the recipe does: what a cached image is compared with."""
        return hashlib.sha256(f"{_BUILDER} {dumps(asdict(self), sort_keys=True)}".encode()).hexdigest()


def _install(*packages: str) -> Step:
    return Step(f"apt-get install {' '.join(packages)}", f"install {' '.join(packages)}")


# /usr/share/doc is removed and made again, so that the layer holds an opaque directory; the rest become whiteouts.
_CLEAN = Step(
    "remove documentation, translations and logs",
    """
    rm -rf "$ROOT"/usr/share/{man,locale,info,doc} "$ROOT"/var/log/apt "$ROOT"/var/cache/debconf/*-old
    rm -f "$ROOT"/var/log/*.log
    mkdir "$ROOT/usr/share/doc"
    echo "Documentation was removed from this image." >"$ROOT/usr/share/doc/README"
    """,
)

# Only logs and one directory: the image is to keep more than 30,000 entries.
_TIDY = Step(
    "remove logs and old caches",
    """
    rm -rf "$ROOT"/var/log/apt "$ROOT"/var/cache/debconf/*-old "$ROOT"/usr/share/info
    rm -f "$ROOT"/var/log/*.log
    mkdir "$ROOT/usr/share/info"
    """,
)

_TENSORFLOW = Step(
    f"pip install {TENSORFLOW}",
    f"""
    target="$ROOT/usr/local/lib/python$PYTHON_VERSION/dist-packages"
    [ -d "$ROOT/usr/lib/python$PYTHON_VERSION" ] || {{ echo "the image's Python is not $PYTHON_VERSION" >&2; exit 1; }}
    "$PIP" install --quiet --no-compile --no-warn-script-location --target "$target" "{TENSORFLOW}"
    """,
)

WEB = Recipe(
    "web",
    (_install("python3", "python3-numpy"), _install("nginx"), _CLEAN),
    ("python3", "-c", "import numpy; print(numpy.__version__)"),
)

ML = Recipe(
    "ml",
    (_install("python3", "python3-numpy", "nginx", "redis-server"), _TENSORFLOW, _TIDY),
    ("python3", "-c", "import tensorflow as tf; print(float(tf.reduce_sum(tf.ones(4))))"),
)

NGINX = Recipe("nginx", (_install("nginx"), _CLEAN), ("nginx", "-g", "daemon off;"))

REDIS = Recipe("redis", (_install("redis-server"), _CLEAN), ("redis-server",))

# Row 9: one layer of 2 GB (uncompressed) with files of all sizes, compressible about as a real image is.
BIG_LAYER_BYTES = 2_000_000_000
