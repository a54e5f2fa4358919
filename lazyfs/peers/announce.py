"""
What nodes and trackers say to each other, as JSON: version 1 of the tracker's API (docs/tracker.md).

Layer: peers. Who calls: peers.membership says it, tracker.service answers. Pure. Unknown fields are skipped, so that
nodes and trackers of different age understand each other; everything else that does not fit is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

PREFIX: Final = "/v1/clusters/"
SWARM_COUNT_MAX = 2048           # resources of one node: 20 images of 100 layers
REPORT_COUNT_MAX = 32            # in one beat
COMPLETE = 1000                  # of Standing.done
PARTIAL = COMPLETE // 10         # so much, and others are told that it has some of it
WHYS: Final = ("lied", "slow", "dead", "refused")

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,128}\Z")]
_Label = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,128}\Z")]
_HOST = r"\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252}"
_Address = Annotated[str, msgspec.Meta(pattern=rf"^({_HOST})?:[0-9]{{1,5}}\Z")]
Key = Annotated[str, msgspec.Meta(pattern=r"^(device|blob|file)/(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")]
_Version = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")]
_Word = Annotated[str, msgspec.Meta(pattern=r"^[a-z]{1,32}\Z")]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
CLUSTER: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


class Announced(msgspec.Struct, omit_defaults=True):
    """
    A node, as it says of itself: model.Member, and what others can reach it by.

    Attributes:
        address: host:port; without a host: that of its connection to the tracker.
        network: members see only those that say the same one: who cannot reach each other do not.

    """

    id: Name
    address: _Address
    zone: _Label = ""
    up_rate: _Count = 0
    network: _Label = ""


class Standing(msgspec.Struct, omit_defaults=True):
    """
    What a node has of a resource.

    Attributes:
        done: thousandths of it; COMPLETE only if all of it is here.
        need: it uses it itself (it is mounted); False: its copy is for others only.
        origin: thousandths of it that this node had from the registry.

    """

    done: Annotated[int, msgspec.Meta(ge=0, le=COMPLETE)] = 0
    need: bool = True
    origin: Annotated[int, msgspec.Meta(ge=0, le=1_000_000)] = 0


class Report(msgspec.Struct, omit_defaults=True):
    """Another member did badly; `why`: one of WHYS."""

    id: Name
    why: _Word
    resource: Annotated[str, msgspec.Meta(max_length=160)] = ""


class Beat(msgspec.Struct, omit_defaults=True):
    """
    All that a node says, each time.

    Attributes:
        swarms: by Resource.key: what it takes part in, all of it.
        seen: by Resource.key: the version of the view that it has.
        leave: it ends; the rest does not count.
        extra: what other parts of the node tell other parts of the tracker, by their names.

    """

    member: Announced
    swarms: Annotated[dict[Key, Standing], msgspec.Meta(max_length=SWARM_COUNT_MAX)] = {}
    seen: Annotated[dict[Key, _Version], msgspec.Meta(max_length=SWARM_COUNT_MAX)] = {}
    leave: bool = False
    reports: Annotated[list[Report], msgspec.Meta(max_length=REPORT_COUNT_MAX)] = []
    extra: Annotated[dict[_Word, msgspec.Raw], msgspec.Meta(max_length=16)] = {}


class Seen(msgspec.Struct, array_like=True):
    """A member in a view; shorter than an object: views have thousands. `partial`: it has PARTIAL, or all of it."""

    id: Name
    address: _Address
    zone: _Label
    up_rate: _Count
    complete: bool
    partial: bool = False


class ViewPart(msgspec.Struct, omit_defaults=True):
    """
    A view, or how it came from an older one.

    Attributes:
        version: of what results, by content: two resources with the same members have the same view.
        since: of what it is added to; empty: nothing, `add` is all.
        add: members that are new or have changed. `gone`: ids.

    """

    version: _Version
    since: Annotated[str, msgspec.Meta(max_length=16)] = ""
    add: list[Seen] = []
    gone: list[Name] = []


class BeatAnswer(msgspec.Struct, omit_defaults=True):
    """
    What the tracker says.

    Attributes:
        seconds: until the node should beat again; sooner if it has news.
        swarms: by Resource.key: the version of its view now; keys that it did not ask for do not come.
        views: those of `swarms` that the node does not have.
        release: by Resource.key: "some" (it is one of some that are told) or "all": a copy that the node does not need
            itself can go.
        isolated: members that others have reported; they are in no view.
        members: of the cluster, the asker included; 0: a tracker that does not say so.

    """

    seconds: Annotated[float, msgspec.Meta(gt=0, le=3600)]
    swarms: dict[Key, _Version] = {}
    views: list[msgspec.Raw] = []
    release: dict[Key, _Word] = {}
    isolated: list[Name] = []
    extra: dict[_Word, msgspec.Raw] = {}
    members: _Count = 0
