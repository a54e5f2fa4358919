"""Manifests: OCI and Docker in, lazy ones out and in again; ambiguous, old and foreign ones refused."""

from __future__ import annotations

import json

import pytest

from lazyfs import limits
from lazyfs.errors import FormatError, UnsupportedError
from lazyfs.image.codec import Codec
from lazyfs.image.descriptor import Descriptor, Document
from lazyfs.image.digest import Digest
from lazyfs.image.manifest import (
    BLOB_TYPE,
    BOOTSTRAP_TYPE,
    PREFIX,
    HotBlob,
    LayerBlob,
    LazyBootstrap,
    LazyParts,
    build_index,
    build_lazy_manifest,
    check_source,
    is_index,
    is_lazy,
    options_key,
    parse_index,
    parse_lazy_manifest,
    parse_manifest,
    source_diff_ids,
)
from lazyfs.image.oci import DOCKER_INDEX, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def manifest(**changes: object) -> dict:
    return {
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {"mediaType": CONFIG_TYPE, "digest": digest(1), "size": 10},
        "layers": [{"mediaType": LAYER_TYPE, "digest": digest(2), "size": 20},
                   {"mediaType": LAYER_TYPE, "digest": digest(3), "size": 30}],
        **changes,
    }


def config(**changes: object) -> bytes:
    return json.dumps(
        {"architecture": "arm64", "os": "linux", "variant": "v8", "config": {"Env": ["A=b"], "Labels": {"x": "é"}},
         "rootfs": {"type": "layers", "diff_ids": [digest(12), digest(13)], "other": 1},
         "history": [{"created_by": "one"}, {"created_by": "two", "empty_layer": True}, {"created_by": "three"}],
         "big": 12345678901234567890123, "float": 1.10, **changes}
    ).encode()


def parts(*, hot: bool = True) -> LazyParts:
    blobs = tuple(
        LayerBlob(Digest(digest(20 + n)), 1000, Digest(digest(2 + n)), Digest(digest(12 + n)),
                  options_key(Codec.LZ4, 6, 1 << 18), Digest(digest(30 + n)), 200)
        for n in range(2)
    )
    return LazyParts(blobs, HotBlob(Digest(digest(40)), 500) if hot else None,
                     LazyBootstrap(Digest(digest(50)), 300, 3000))


def build(*, hot: bool = True, source: dict | None = None, source_config: bytes | None = None) -> tuple[dict, dict]:
    data = json.dumps(source or manifest()).encode()
    made, new_config = build_lazy_manifest(
        parse_manifest(data, ""), Digest.of(data), source_config or config(), parts(hot=hot),
        bootstrap_diff_id=Digest(digest(51)),
    )
    assert json.loads(made)["config"]["digest"] == Digest.of(new_config).text
    return json.loads(made), json.loads(new_config)


def parse_lazy(document: dict):
    return parse_lazy_manifest(parse_manifest(json.dumps(document).encode(), OCI_MANIFEST))


# --- any image ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST, ""])
def test_manifests_of_both_worlds(media_type: str) -> None:
    document = manifest(mediaType=media_type, annotations={"a": "b"})
    if not media_type:
        del document["mediaType"]
    parsed = parse_manifest(json.dumps(document).encode(), media_type or "application/json")
    assert parsed.config.size == 10
    assert [layer.digest.text for layer in parsed.layers] == [digest(2), digest(3)]
    assert parsed.annotations == {"a": "b"}


def test_index() -> None:
    member = {"mediaType": OCI_MANIFEST, "digest": digest(9), "size": 5, "annotations": {"k": "v"},
              "platform": {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["x"]}}
    data = json.dumps({"schemaVersion": 2, "manifests": [member]}).encode()
    assert is_index("", data)
    parsed = parse_index(data, DOCKER_INDEX)
    assert parsed.manifests == (
        Descriptor(OCI_MANIFEST, Digest(digest(9)), 5, {"k": "v"}, member["platform"]),
    )
    assert parsed.media_type == DOCKER_INDEX


@pytest.mark.parametrize(
    ("document", "stated", "error"),
    [
        ({"schemaVersion": 1, "fsLayers": []}, "", UnsupportedError),
        (manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws", UnsupportedError),
        (manifest(manifests=[]), "", FormatError),
        (manifest(), OCI_INDEX, FormatError),
        (manifest(mediaType=OCI_INDEX), "", FormatError),
        (manifest(mediaType=OCI_INDEX), OCI_MANIFEST, FormatError),
        (manifest(mediaType="text/html"), "", UnsupportedError),
        (manifest(schemaVersion=3), "", UnsupportedError),
        (manifest(layers=None), "", FormatError),
        (manifest(layers=[{}]), "", FormatError),
        (manifest(layers=[{"mediaType": LAYER_TYPE, "digest": "sha512:00", "size": 1}]), "", FormatError),
        (manifest(layers=[{"mediaType": LAYER_TYPE, "digest": digest(1), "size": -1}]), "", FormatError),
        (manifest(layers=[{"mediaType": LAYER_TYPE, "digest": digest(1), "size": 1 << 63}]), "", FormatError),
        (manifest(layers=[{"mediaType": LAYER_TYPE, "digest": digest(1), "size": 1.5}]), "", FormatError),
        (manifest(annotations={"a": 1}), "", FormatError),
        (manifest(layers=manifest()["layers"] * 2000), "", FormatError),
        (manifest(config=None), "", FormatError),
        ({"schemaVersion": 2}, "", FormatError),
        ([], "", FormatError),
        (None, OCI_MANIFEST, FormatError),
    ],
)
def test_documents_that_are_refused(document: object, stated: str, error: type[FormatError]) -> None:
    with pytest.raises(error) as caught:
        parse_manifest(json.dumps(document).encode(), stated)
    assert type(caught.value) is error


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b'{"layers":[],"config":' + b"[" * 100_000,
                                  b'{"schemaVersion":2,"layers":[],"x":"\xff"}',
                                  b" " * (limits.MANIFEST_BYTES_MAX + 1)])
def test_bytes_that_are_no_document(data: bytes) -> None:
    for parse in (parse_manifest, parse_index):
        with pytest.raises(FormatError):
            parse(data, "")


# --- sources --------------------------------------------------------------------------------------------------------


def test_a_readable_source() -> None:
    check_source(parse_manifest(json.dumps(manifest()).encode(), ""))
    assert [one.text for one in source_diff_ids(config(), 2)] == [digest(12), digest(13)]
    with pytest.raises(FormatError, match="2 layers, the manifest 3"):
        source_diff_ids(config(), 3)


@pytest.mark.parametrize(
    ("media_type", "message"),
    [("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "not distributable"),
     ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "not distributable"),
     ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "media type"), ("", "media type")],
)
def test_layers_that_cannot_be_read(media_type: str, message: str) -> None:
    layer = {"mediaType": media_type, "digest": digest(2), "size": 1, "urls": ["http://169.254.169.254/"]}
    with pytest.raises(UnsupportedError, match=message):
        check_source(parse_manifest(json.dumps(manifest(layers=[layer])).encode(), ""))


def test_an_artifact_is_no_image() -> None:
    chart = manifest(config={"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": digest(1), "size": 2})
    with pytest.raises(UnsupportedError, match="not a container image"):
        check_source(parse_manifest(json.dumps(chart).encode(), ""))


def test_a_lazy_image_is_no_source() -> None:
    made, _ = build()
    with pytest.raises(FormatError, match="already"):
        check_source(parse_manifest(json.dumps(made).encode(), ""))


# --- lazy images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hot", [True, False])
def test_lazy_manifest_comes_back(hot: bool) -> None:
    made, _ = build(hot=hot)
    lazy = parse_lazy(made)
    assert (lazy.layers, lazy.hot, lazy.bootstrap) == (parts(hot=hot).layers, parts(hot=hot).hot, parts().bootstrap)
    assert lazy.source_digest == Digest.of(json.dumps(manifest()).encode())
    assert [layer["mediaType"] for layer in made["layers"]] == [BLOB_TYPE] * (3 if hot else 2) + [BOOTSTRAP_TYPE]
    assert is_lazy(parse_manifest(json.dumps(made).encode(), ""))


def test_labels_fit_containerd() -> None:
    """containerd refuses labels of more than 4096 bytes, key and value."""
    made, _ = build()
    for layer in made["layers"]:
        assert layer["mediaType"].startswith("application/vnd.oci.image.layer.")
        for key, value in layer["annotations"].items():
            assert key.startswith("containerd.io/snapshot/")
            assert len(key) + len(value) < 4096


def test_source_annotations_are_kept_and_it_is_deterministic() -> None:
    source = manifest(annotations={"org.opencontainers.image.title": "t", "z": "1", "a": "2"})
    made, _ = build(source=source)
    assert source["annotations"].items() <= made["annotations"].items()
    assert list(made["annotations"]) == sorted(made["annotations"])
    assert build(source=source) == build(source=source)


def test_config_is_kept_but_for_layers_and_history() -> None:
    _, new = build()
    old = json.loads(config())
    assert new["rootfs"].pop("diff_ids") == [digest(20), digest(21), digest(40), digest(51)]
    assert old["rootfs"].pop("diff_ids")
    assert new["history"][:3] == old["history"]
    assert [entry["comment"] for entry in new["history"][3:]] == ["lazyfs: hot blob", "lazyfs: bootstrap"]
    del new["history"], old["history"]
    assert new == old
    assert list(new) == list(old)


def test_numbers_of_the_config_are_kept_digit_by_digit() -> None:
    data = config().replace(b"12345678901234567890123", b"1.50e+300").replace(b"1.1", b"0.10000000000000000001")
    _, new = build_lazy_manifest(
        parse_manifest(json.dumps(manifest()).encode(), ""), Digest(digest(1)), data, parts(),
        bootstrap_diff_id=Digest(digest(51)),
    )
    assert b"1.50e+300" in new
    assert b"0.10000000000000000001" in new


@pytest.mark.parametrize(
    "history",
    [None, [], [{"created_by": "one"}], [{"empty_layer": True}] * 3, [{"created_by": str(n)} for n in range(5)],
     [{"empty_layer": None}, {"empty_layer": False}]],
)
def test_history_has_one_entry_a_layer_whatever_the_source_had(history: object) -> None:
    made, new = build(source_config=config(history=history))
    assert sum(not entry.get("empty_layer") for entry in new["history"]) == len(made["layers"])
    assert len(new["history"]) >= len(history or [])
    kept = [{key: value for key, value in entry.items() if key != "empty_layer"} for entry in history or []]
    found = [{key: value for key, value in entry.items() if key != "empty_layer"} for entry in new["history"]]
    assert found[: len(kept)] == kept


@pytest.mark.parametrize(
    "data",
    [b"{}", b"[]", b"", config(rootfs={"type": "layers", "diff_ids": [digest(1)]}),
     config(rootfs={"type": "x", "diff_ids": []}),
     config(history=[1]), config(history="x"), config(history=[{"empty_layer": "yes"}]), config(os=None)],
)
def test_a_source_config_that_is_off(data: bytes) -> None:
    with pytest.raises(FormatError):
        build_lazy_manifest(parse_manifest(json.dumps(manifest()).encode(), ""), Digest(digest(1)), data, parts(),
                            bootstrap_diff_id=Digest(digest(51)))


def test_not_lazy_says_what_to_do() -> None:
    with pytest.raises(FormatError, match="not a lazy image") as caught:
        parse_lazy(manifest())
    assert "lazyfs convert" in caught.value.hint


@pytest.mark.parametrize(
    ("layer", "key", "value", "error"),
    [
        (0, "version", "2", UnsupportedError), (0, "version", None, UnsupportedError),
        (-1, "version", "0", UnsupportedError),
        (-1, "bootstrap", "2", UnsupportedError), (None, "version", "2", UnsupportedError),
        (None, "source", None, FormatError),
        (0, "source", "x", FormatError), (0, "source.diff-id", None, FormatError), (0, "options", None, FormatError),
        (0, "tail.digest", digest(1)[:-1], FormatError), (0, "tail.size", "-1", FormatError),
        (0, "tail.size", "1001", FormatError), (0, "tail.size", "96", FormatError), (0, "tail.size", "٣٣", FormatError),
        (0, "tail.size", "9" * 19, FormatError), (0, "blob", "hot", FormatError), (1, "blob", "x", FormatError),
        (2, "blob", "layer", FormatError), (-1, "bootstrap.size", "0", FormatError),
        (-1, "bootstrap.size", str(limits.BOOTSTRAP_BYTES_MAX + 1), FormatError),
        (-1, "bootstrap.size", None, FormatError),
        (-1, "bootstrap", None, FormatError),
    ],
)
def test_annotations_that_are_off(layer: int | None, key: str, value: str | None, error: type[FormatError]) -> None:
    made, _ = build()
    annotations = (made if layer is None else made["layers"][layer])["annotations"]
    if value is None:
        del annotations[PREFIX + key]
    else:
        annotations[PREFIX + key] = value
    with pytest.raises(error):
        parse_lazy(made)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_media_types_that_are_off(layer: int) -> None:
    made, _ = build()
    made["layers"][layer]["mediaType"] = LAYER_TYPE
    with pytest.raises(FormatError, match="media type"):
        parse_lazy(made)


def test_options_key_tells_apart_what_changes_bytes() -> None:
    keys = {options_key(codec, level, size) for codec in (Codec.LZ4, Codec.ZSTD) for level in (1, 6)
            for size in (1 << 16, 1 << 18)}
    assert len(keys) == 8
    assert options_key(Codec.LZ4, 6, 1 << 18) == "v1.2,lz4,6,262144"
    with pytest.raises(UnsupportedError):
        options_key(Codec.LZ4, 6, 1000)


def test_built_index_keeps_order_platforms_and_annotations() -> None:
    members = [
        {"mediaType": DOCKER_MANIFEST, "digest": digest(n), "size": n,
         "platform": {"os": "linux", "architecture": arch},
         "annotations": {"n": str(n)}}
        for n, arch in ((1, "amd64"), (2, "arm64"), (3, "unknown"))
    ]
    source = parse_index(json.dumps({"schemaVersion": 2, "manifests": members, "annotations": {"b": "1"}}).encode(), "")
    made = {Digest(digest(n)): Document(b"x" * n, OCI_MANIFEST, Digest(digest(100 + n))) for n in (2, 1)}
    data = build_index(source, made)
    assert data == build_index(source, dict(reversed(made.items())))
    parsed = parse_index(data, "")
    assert parsed.media_type == OCI_INDEX
    assert parsed.annotations == {"b": "1"}
    assert [(one.digest.text, one.size, one.media_type, one.platform, one.annotations) for one in parsed.manifests] == [
        (digest(101), 1, OCI_MANIFEST, members[0]["platform"], {"n": "1"}),
        (digest(102), 2, OCI_MANIFEST, members[1]["platform"], {"n": "2"}),
    ]
