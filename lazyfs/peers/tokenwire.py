"""
How a node asks a tracker for tokens, as JSON: part of version 1 of the tracker's API (docs/tracker.md, docs/tokens.md).

Layer: peers. Who calls: peers.authority asks, tracker.issuing answers. Pure. A question holds a registry's credential:
it is in `authorization` alone, which no repr shows, and which is kept by neither side.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from lazyfs import shapes
from lazyfs.errors import FormatError
from lazyfs.peers.announce import Name  # noqa: TC001 - msgspec looks at it

TOKENS_PATH: Final = "/v1/clusters/{cluster}/tokens"
KEYS_PATH: Final = "/v1/keys"
PROOF_QUERY: Final = "proof="
KEY_COUNT_MAX = 512              # layers of an image
ASK_BYTES_MAX = 128 * 1024       # 512 names of 80 bytes, and a registry's token of 16 KiB
_AUTHORIZATION_CHARS_MAX = 32 * 1024
_SIZE_MAX = 1 << 62
_Key = Annotated[str, msgspec.Meta(pattern=r"^(\*|(device|blob|file)/sha256:[0-9a-f]{64})\Z")]


class Proof(msgspec.Struct, omit_defaults=True):
    """
    What is to prove the right to some resources.

    Attributes:
        source: `docker://host/repository` that they are pulled from.
        bootstrap: digest of the bootstrap layer there that has the devices; empty: they are blobs of their own.
        size: of that layer, as it is stored; `raw_size`: as it is uncompressed.
        authorization: what the asker's registry credential is on the wire: `Bearer ...`, `Basic ...`; empty: the
            repository is open to everybody.

    """

    source: Annotated[str, msgspec.Meta(max_length=1024)]
    bootstrap: Annotated[str, msgspec.Meta(max_length=128)] = ""
    size: Annotated[int, msgspec.Meta(ge=0, le=_SIZE_MAX)] = 0
    raw_size: Annotated[int, msgspec.Meta(ge=0, le=_SIZE_MAX)] = 0
    authorization: Annotated[str, msgspec.Meta(max_length=_AUTHORIZATION_CHARS_MAX)] = ""

    def __repr__(self) -> str:
        return f"Proof({self.source}, {self.bootstrap})"


class TokenAsk(msgspec.Struct, omit_defaults=True):
    """
    A question.

    Attributes:
        member: whose the tokens are to be.
        holder: the raw public key that they are bound to, base64url; its owner signs the whole body (PROOF_QUERY).
        keys: Resource.key of each, or EVERYTHING alone.
        proof: None: the cluster has tokens that prove no more than membership.

    """

    member: Name
    holder: Annotated[str, msgspec.Meta(max_length=64)]
    keys: Annotated[list[_Key], msgspec.Meta(min_length=1, max_length=KEY_COUNT_MAX)]
    proof: Proof | None = None


class TokenAnswer(msgspec.Struct):
    """`tokens`: by Resource.key; a key that is not there was not granted. `seconds`: that they are good."""

    tokens: dict[str, str]
    seconds: Annotated[float, msgspec.Meta(gt=0, le=600)]


_ask = shapes.json_decoder(TokenAsk)
_answer = shapes.json_decoder(TokenAnswer)


def parse_ask(data: bytes) -> TokenAsk:
    """Raises FormatError, without a word of what was in it."""
    try:
        return _ask.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise FormatError("this is not a question for tokens", hint="docs/tokens.md") from None


def parse_answer(data: bytes) -> TokenAnswer:
    """Raises FormatError."""
    try:
        return _answer.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise FormatError("the tracker's answer holds no tokens") from None
