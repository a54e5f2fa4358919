"""
`lazyfs sign IMAGE --key FILE` and `lazyfs verify IMAGE --key FILE`: signatures as cosign keeps them.

Layer: cli; thin: the work is in lazyfs.registry.signatures and lazyfs.image.keys, imported inside the commands.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lazyfs import limits
from lazyfs.cli.options import platform_option, registry_options
from lazyfs.cli.output import print_json
from lazyfs.cli.profile_inputs import json_option
from lazyfs.errors import SignatureError, UsageError

if TYPE_CHECKING:
    from lazyfs.image.descriptor import Document
    from lazyfs.registry import RegistryOptions

_SIGN_EPILOG = """\b
Examples:
  openssl genpkey -algorithm ED25519 -out signer.key
  openssl pkey -in signer.key -pubout -out signer.pub
  lazyfs sign registry.example/app:1-lazy --key signer.key
"""
_VERIFY_EPILOG = """\b
Examples:
  lazyfs verify registry.example/app:1-lazy --key signer.pub

\b
Exit codes:
  13  none of the keys has signed it
"""


@click.command("sign", epilog=_SIGN_EPILOG)
@click.argument("image", metavar="IMAGE")
@click.option("--key", "key_file", metavar="FILE", required=True, type=click.Path(path_type=Path),
              help="Private key (PEM: ECDSA, Ed25519, RSA); its password: LAZYFS_KEY_PASSWORD.")
@json_option
@platform_option
@registry_options
def sign_command(image: str, *, key_file: Path, as_json: bool, platform: str | None, registry: RegistryOptions) -> None:
    """
    Sign IMAGE, and put the signature beside it, where cosign would.

    What is signed is the digest that IMAGE names: of a manifest, or of an index, which vouches for all that it names.
    With --platform: of that platform's manifest. A moved tag is not signed any more.
    """
    from lazyfs.image.keys import KEY_BYTES_MAX, sign  # noqa: PLC0415
    from lazyfs.image.signature import build_payload, signature_tag  # noqa: PLC0415
    from lazyfs.registry import FileReference, open_destination, parse_reference  # noqa: PLC0415
    from lazyfs.registry.reference import FileTransport  # noqa: PLC0415
    from lazyfs.registry.signatures import put_signature  # noqa: PLC0415

    reference = parse_reference(image)
    if isinstance(reference, FileReference) and reference.transport is not FileTransport.OCI:
        raise UsageError(f"{image}: nothing can be put beside an image in an archive",
                         hint="push it to a registry or an oci: directory first")
    private = _read(key_file, KEY_BYTES_MAX)
    subject = _subject(image, platform, registry)
    name = reference.identity.removeprefix("docker://")
    payload = build_payload(subject.digest, name)
    password = os.environ.get("LAZYFS_KEY_PASSWORD")
    value, key = sign(private, password.encode() if password else None, payload, str(key_file))
    if not key.verifies(value, payload):
        raise UsageError(f"{key_file}: the key does not verify its own signature")
    beside = replace(reference, tag=signature_tag(subject.digest), digest=None)
    with contextlib.closing(open_destination(beside.text, registry)) as place:
        put_signature(place, subject.digest, payload, value, time.monotonic() + limits.REQUEST_DEADLINE_S)
    if as_json:
        print_json({"image": image, "subject": subject.digest.text, "signature": beside.text})
    else:
        click.echo(f"{name}@{subject.digest}: signed")


@click.command("verify", epilog=_VERIFY_EPILOG)
@click.argument("image", metavar="IMAGE")
@click.option("--key", "key_files", metavar="FILE", required=True, multiple=True, help="Public key (PEM); repeatable.")
@json_option
@platform_option
@registry_options
def verify_command(
    image: str, *, key_files: tuple[str, ...], as_json: bool, platform: str | None, registry: RegistryOptions
) -> None:
    """Say which of the keys has signed the lazy image IMAGE: what a node with these keys would mount."""
    from lazyfs.image.oci import parse_manifest  # noqa: PLC0415
    from lazyfs.node.verifying import find_evidence, load_keys  # noqa: PLC0415
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    keys = load_keys(key_files)
    with contextlib.closing(open_source(image, registry)) as source:
        manifest = select_image(source, platform)
        layers = parse_manifest(manifest.data, manifest.media_type).layers
        if not layers:
            raise SignatureError(f"{image}: no image, so there is nothing to verify")
        deadline = time.monotonic() + limits.REQUEST_DEADLINE_S
        _, key = find_evidence(source, manifest, keys, wanted=layers[-1].digest, config=b"", deadline=deadline)
    if as_json:
        print_json({"image": image, "subject": manifest.digest.text, "key": key.name})
    else:
        click.echo(f"{image}: {manifest.digest} is signed by {key.name}")


def _read(path: Path, size_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(size_max + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    if len(data) > size_max:
        raise UsageError(f"{path}: no key, larger than {size_max} bytes")
    return data


def _subject(image: str, platform: str | None, registry: RegistryOptions) -> Document:
    from lazyfs.registry import open_source  # noqa: PLC0415
    from lazyfs.registry.select import select_image  # noqa: PLC0415

    with contextlib.closing(open_source(image, registry)) as source:
        return source.root() if platform is None else select_image(source, platform)
