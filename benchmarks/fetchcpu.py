"""
What fetching costs: CPU seconds for each GB that comes over the link, decoded, checked and stored in the cache.

`python -m benchmarks.fetchcpu [--runs N] [--mb N] [--flame]`. One process, pinned to one core, prefetches a blob from
docker-registry, pinned to another; codecs in turns. Data: the first megabytes of the large image's largest layer,
chunks of 1 MiB, default levels. Wanted: 1 Gbit/s on one core, which is 125 MB of stored bytes for each CPU second.
`--flame` draws `results/fetch-flame.svg` of one more run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal import isal_zlib

from benchmarks.fetchload import Spec
from benchmarks.figures import FOLDER
from benchmarks.imagekit.layout import read_json
from benchmarks.kit.proc import run
from benchmarks.kit.stacks import flame_svg
from benchmarks.kit.workspace import Workspace, measured
from benchmarks.session import TENSORFLOW, Session
from lazyfs.image.codec import LEVEL_DEFAULTS, Codec, compress
from lazyfs.image.digest import Digest, chunk_digest
from lazyfs.image.table import ROW
from lazyfs.limits import BLOCK_SIZE_BYTES, CHUNK_SIZE_DEFAULT_BYTES
from lazyfs.registry import RegistryOptions, open_destination

if TYPE_CHECKING:
    from typing import Any

CODECS = {"zstd": Codec.ZSTD, "lz4": Codec.LZ4, "none": Codec.NONE}
GBIT = 125e6          # bytes a second
_TIMEOUT_S = 300.0
_GZIP = 31            # zlib's wbits
_CORES = (0, 1)       # who fetches, who serves


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetchcpu", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--mb", type=int, default=256, help="uncompressed, MiB")
    parser.add_argument("--codecs", nargs="*", default=["zstd", "lz4"], choices=list(CODECS))
    parser.add_argument("--flame", action="store_true", help="draw the flame graph of the first codec")
    parser.add_argument("--trees", nargs="*", default=[""], help="checkouts to compare, in turns; empty: this one")
    options = parser.parse_args()

    def measure_all(place: Workspace) -> None:
        session = Session(place, options.runs)
        specs = {name: prepare(session, CODECS[name], name, options.mb) for name in options.codecs}
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for _ in range(options.runs):
            for name, spec in specs.items():
                for tree in options.trees:
                    found.setdefault((name, tree), []).append(fetch(place, spec, tree))
        for (name, tree), runs in found.items():
            print(f"{name:5} {show(runs)}  {tree}", flush=True)
        if options.flame:
            draw(place, specs[options.codecs[0]], options.codecs[0])

    return measured("fetchcpu", measure_all)


def prepare(session: Session, codec: Codec, name: str, megabytes: int) -> dict[str, Any]:
    """Make a blob of real data and push it; what `Spec` needs, without the cache's directory."""
    size = megabytes << 20
    packed = largest_layer(session.layout(TENSORFLOW)).read_bytes()
    data: bytes = isal_zlib.decompressobj(_GZIP).decompress(packed, max_length=size)
    data = data[: len(data) - len(data) % BLOCK_SIZE_BYTES]
    chunks = [data[start : start + CHUNK_SIZE_DEFAULT_BYTES] for start in range(0, len(data), CHUNK_SIZE_DEFAULT_BYTES)]
    rows, stored = np.zeros(len(chunks), dtype=ROW), bytearray()
    for index, chunk in enumerate(chunks):
        used, piece = compress(chunk, codec, LEVEL_DEFAULTS[codec])
        rows[index] = (len(stored), len(piece), 0, used, 0, chunk_digest(chunk))
        stored += piece
    blob = Digest.of(bytes(stored))
    image = session.near.reference("fetchcpu")
    destination = open_destination(image, RegistryOptions(insecure=True))
    try:
        destination.put_bytes(bytes(stored), blob)
    finally:
        destination.close()
    path = session.place.top / f"rows-{name}"
    rows.tofile(path)
    os.sched_setaffinity(session.near.daemon.pid, {_CORES[1]})
    return {"image": image, "blob": str(blob), "blob_size": len(stored), "rows": str(path), "cpu": _CORES[0],
            "chunk_size": CHUNK_SIZE_DEFAULT_BYTES, "device_size": len(data)}


def largest_layer(layout: Path) -> Path:
    manifest = read_json(layout, json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
    digest: str = max(manifest["layers"], key=lambda layer: layer["size"])["digest"]
    return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")


def fetch(place: Workspace, spec: dict[str, Any], tree: str, folded: str = "") -> dict[str, Any]:
    """One run with an empty cache. `tree`: of another checkout, whose `lazyfs` is used."""
    full = Spec(**spec, cache=str(place.folder("cache")), folded=folded)
    words = [sys.executable, "-m", "benchmarks.fetchload", json.dumps({name: getattr(full, name)
                                                                      for name in Spec.__slots__})]
    top = tree or str(Path(__file__).resolve().parents[1])
    found: dict[str, Any] = json.loads(run(words, timeout_s=_TIMEOUT_S, cwd=Path(top), env={"PYTHONPATH": top}).stdout)
    return found


def show(runs: list[dict[str, Any]]) -> str:
    """Least and median CPU seconds a GB of stored bytes, and what they are made of."""
    cpu = [(one["user_s"] + one["system_s"]) / (one["stored_bytes"] / 1e9) for one in runs]
    middle = statistics.median(cpu)
    best = min(runs, key=lambda one: one["user_s"] + one["system_s"])
    return (f"CPU s/GB stored: least {min(cpu):.2f} median {middle:.2f} = {1e9 / middle / GBIT:.2f} Gbit/s a core "
            f"(best {1e9 / min(cpu) / GBIT:.2f}); best run: user {best['user_s']:.2f} system {best['system_s']:.2f} "
            f"wall {best['wall_s']:.2f} s, {best['stored_bytes'] / 1e6:.0f} -> {best['device_bytes'] / 1e6:.0f} MB, "
            f"{best['requests']} requests, {best['switches']} switches, {best['faults']} faults")


def draw(place: Workspace, spec: dict[str, Any], codec: str) -> None:
    folded = place.top / "folded"
    fetch(place, spec, "", str(folded))
    title = f"CPU time of fetching {spec['device_size'] >> 20} MiB ({codec}) from a registry into the cache"
    (FOLDER / "fetch-flame.svg").write_text(flame_svg(folded.read_text(), title))
    print(f"drawn: {FOLDER / 'fetch-flame.svg'}")


if __name__ == "__main__":
    sys.exit(main())
